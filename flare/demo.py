"""The demo: a tiny base model from the embedded corpus, then the real scripts, end to end and offline.

    ./run_training.sh demo

Patch, stage 1, stage 2 and evaluation run as a user would run them. What is finished is not done again.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from flare.config import REPO
from flare.data.tokens import default_cache_dir
from flare.errors import FlareError, run_script
from flare.experiment import Experiment

CONFIG = REPO / "examples" / "demo.json"
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
BASE_STEPS = 850
CONTEXT_LENGTHS = "64,128,256,512,1024"
"""Up to four times the rows that the stages train on (examples/demo.json)."""
NOPE_LAYERS = "every:3"
"""Layers 2 and 5. In such a small model a single layer learns to look at the previous token, another one for each
seed; these two cost something whatever the seed (docs/experiments.md)."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    t0 = time.perf_counter()
    demo = Demo(Path(args.output_dir), args.seed)
    demo.run()
    demo.print_summary(time.perf_counter() - t0)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./run_training.sh demo", description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", default=str(REPO / "demo_output"), help="where all of it goes [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the base's weights and the row order")
    return parser.parse_args(argv)


class Demo:
    """Steps of the demo under one output directory."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.seed = seed
        self.start = root / "base_start"
        self.base = Experiment(root / "base")
        self.patched = root / "patched"
        self.demo = Experiment(root / "demo")
        self.stage1_model = self.demo.stage1 / "final_model"
        self.results = self.demo.root / "evaluation" / "evaluation_results.json"

    def run(self) -> None:
        """Every step that is not done yet."""
        self.step("tiny Qwen2 with random weights, tokenizer from the embedded corpus", self.start, self.make_start)
        self.step("pretrain the base with RoPE everywhere", self.base.final_model, self.pretrain)
        self.step("remove RoPE from chosen layers", self.patched, self.patch)
        self.step("stage 1: train the NoPE layers, two processes", self.stage1_model, self.stage1)
        self.step("stage 2: train everything", None if self.demo.result_of(2) is None else self.root, self.stage2)
        self.step("evaluate", self.results, self.evaluate)

    def step(self, title: str, result: Path | None, work: object) -> None:
        """Say what comes, and do it unless its result is there."""
        if result is not None and result.exists():
            print(f"== {title}: done already", flush=True)
            return
        print(f"== {title}", flush=True)
        work()

    def make_start(self) -> None:
        """Write the base's random start and its tokenizer."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

        from flare.data.embedded import embedded_documents
        from flare.nope.load import quiet_transformers

        part = self.start.with_name(".base_start.tmp")
        shutil.rmtree(part, ignore_errors=True)
        texts = (text for _, text in embedded_documents(default_cache_dir(None)))
        tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, SHAPE["vocab_size"], show_progress=False)
        torch.manual_seed(self.seed)
        end = tokenizer.eos_token_id
        config = Qwen2Config(**SHAPE, bos_token_id=end, eos_token_id=end, dtype="float32")
        with quiet_transformers():
            Qwen2ForCausalLM(config).save_pretrained(part)
            tokenizer.save_pretrained(part)
        part.rename(self.start)

    def pretrain(self) -> None:
        self.train(
            2, self.base, "--model_name_or_path", str(self.start), "--no_rope_layers", "none",
            "--max_steps", str(BASE_STEPS), "--learning_rate", "1.5e-3", "--eval_steps", "200",
            "--nproc_per_node", "2", "--logging_steps", "50",
        )  # fmt: skip

    def patch(self) -> None:
        self.python(
            "patch_qwen_rope.py", "--model_name_or_path", str(self.base.final_model),
            "--no_rope_layers", NOPE_LAYERS, "--output_dir", str(self.patched),
        )  # fmt: skip

    def stage1(self) -> None:
        self.train(1, self.demo, "--model_name_or_path", str(self.patched), "--nproc_per_node", "2")

    def stage2(self) -> None:
        self.train(2, self.demo, "--nproc_per_node", "2")

    def evaluate(self) -> None:
        self.python(
            "evaluate_model_enhanced.py", "--model_path", str(self.demo.final_model), "--datasets", "embedded",
            "--max_length", "256", "--batch_size", "8", "--device", "cpu",
            "--context_lengths", CONTEXT_LENGTHS, "--generate_tokens", "48",
            "--compare_to", str(self.base.final_model), str(self.patched), str(self.stage1_model),
        )  # fmt: skip

    def train(self, stage: int, experiment: Experiment, *flags: str) -> None:
        self.python(
            "train_qwen_multi_gpu.py", "--config", str(CONFIG), "--stage", str(stage), "--gpu_type", "cpu",
            "--base_output_dir", str(self.root), "--experiment_name", experiment.root.name,
            "--seed", str(self.seed), *flags,
        )  # fmt: skip

    def python(self, script: str, *flags: str) -> None:
        """Run one of our scripts as a user would, and stop at its first failure."""
        print(f"$ python {script} {shlex.join(flags)}", flush=True)
        result = subprocess.run([sys.executable, str(REPO / script), *flags])
        if result.returncode:
            raise FlareError(f"the demo stopped: {script} ended with exit code {result.returncode}")

    def print_summary(self, seconds: float) -> None:
        """The table and where to look."""
        from flare.evaluation.report import milestones_table

        results = json.loads(self.results.read_text(encoding="utf-8"))
        print("\n" + milestones_table(results, "embedded"))
        print("\n" + textwrap.fill(results["verdict"], 100))
        print(f"\nreport:       {self.results.with_name('evaluation_report.md')}")
        print(f"TensorBoard:  tensorboard --logdir={shlex.quote(str(self.demo.tensorboard))}")
        print(f"final model:  {self.demo.final_model}")
        print(f"({seconds:.0f} s)")


if __name__ == "__main__":
    sys.exit(run_script(main))

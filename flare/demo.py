"""The demo makes a tiny base model from the embedded corpus and runs the real scripts on it, offline.

    ./run_training.sh demo [--control]

Patch, stage 1, stage 2 and evaluation run as a user would run them. Finished steps are not repeated.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from flare.argument_parser import OneLineParser
from flare.data.cache_dir import default_cache_dir
from flare.errors import FlareError, run_script
from flare.files import REPO
from flare.logs import quiet_torchao
from flare.run.experiment import Experiment

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
"""Up to four times the training length in examples/demo.json."""
NOPE_LAYERS = "every:3"
"""Layers 2 and 5. In a model this small a single layer learns to attend to the previous token, and the seed decides
which one. Without these two layers the loss rises for every seed (docs/experiments.md)."""
KEEP_ROPE = ("--no_rope_layers", "none", "--nproc_per_node", "2")
TOY = (
    "This model has 1.3 million parameters and was trained on rows of 256 tokens. The demo shows what each step does "
    "and how it is measured. It does not show what removing RoPE does to a real model."
)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    quiet_torchao()
    t0 = time.perf_counter()
    demo = Demo(Path(args.output_dir), args.seed, args.control)
    demo.run()
    demo.print_summary(time.perf_counter() - t0)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser("./run_training.sh demo", "[flags]", __doc__.split("\n")[0], "")
    place = Path(os.environ.get("FLARE_OUTPUT_DIR") or REPO) / "demo_output"
    group = parser.add_argument_group("optional flags")
    group.add_argument(
        "--output_dir", metavar="DIR", default=str(place), help="directory of all results (default: %(default)s)"
    )
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the weights and the row order (default: %(default)s)"
    )
    group.add_argument(
        "--control",
        action="store_true",
        help="also train the base model in the same two stages with RoPE kept, and compare (takes a minute more)",
    )
    return parser.parse_args(argv)


class Demo:
    """The steps of the demo and their directories."""

    def __init__(self, root: Path, seed: int, with_control: bool = False) -> None:
        self.root = root
        self.seed = seed
        self.with_control = with_control
        self.verdict_was_printed = False
        self.start = root / "base_start"
        self.base = Experiment(root / "base")
        self.patched = root / "patched"
        self.demo = Experiment(root / "demo")
        self.control = Experiment(root / "control")
        self.stage1_model = self.demo.stage1 / "final_model"
        self.control_stage1_model = self.control.stage1 / "final_model"
        self.results = self.demo.root / "evaluation" / "evaluation_results.json"

    def run(self) -> None:
        """Run every step that is not finished."""
        self.step("tiny Qwen2 with random weights, tokenizer from the embedded corpus", self.start, self.make_start)
        self.step("pretrain the base with RoPE in every layer", self.base.final_model, self.pretrain)
        self.step("remove RoPE from chosen layers", self.patched, self.patch)
        self.step("stage 1: train the NoPE layers with two processes", self.stage1_model, self.stage1)
        self.step("stage 2: train all layers", self.demo.final_model_of(2), self.stage2)
        if self.with_control:
            self.step(
                "control, stage 1: train the same layers, RoPE kept", self.control_stage1_model, self.control_stage1
            )
            self.step(
                "control, stage 2: train all layers, RoPE kept", self.control.final_model_of(2), self.control_stage2
            )
        self.verdict_was_printed = not self.is_evaluated()  # by the evaluation
        self.step("evaluate", self.results if self.is_evaluated() else None, self.evaluate)

    def step(self, title: str, result: Path | None, work: object) -> None:
        """Print the title and run the step, unless its result exists."""
        if result is not None and result.exists():
            print(f"== {title}: already done", flush=True)
            return
        print(f"== {title}", flush=True)
        work()

    def make_start(self) -> None:
        """Write the base model with random weights, and its tokenizer."""
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

        from flare.data.sources.embedded import embedded_documents
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

    def control_stage1(self) -> None:
        base = str(self.base.final_model)
        self.train(1, self.control, *KEEP_ROPE, "--model_name_or_path", base, "--train_layers", "2", "5")

    def control_stage2(self) -> None:
        self.train(2, self.control, *KEEP_ROPE)

    def is_evaluated(self) -> bool:
        """Whether results exist and, with ``--control``, contain the control."""
        if not self.results.is_file():
            return False
        return not self.with_control or "control" in {m["role"] for m in self.read_results()["milestones"]}

    def read_results(self) -> dict:
        return json.loads(self.results.read_text(encoding="utf-8"))

    def evaluate(self) -> None:
        compared = [self.base.final_model, self.patched, self.stage1_model]
        compared += [self.control.final_model] if self.with_control else []
        self.python(
            "evaluate_model_enhanced.py", "--model_path", str(self.demo.final_model), "--datasets", "embedded",
            "--max_length", "256", "--batch_size", "8", "--device", "cpu",
            "--context_lengths", CONTEXT_LENGTHS, "--generate_tokens", "48",
            "--compare_to", *map(str, compared),
        )  # fmt: skip

    def train(self, stage: int, experiment: Experiment, *flags: str) -> None:
        self.python(
            "train_qwen_multi_gpu.py", "--config", str(CONFIG), "--stage", str(stage), "--gpu_type", "cpu",
            "--base_output_dir", str(self.root), "--experiment_name", experiment.root.name,
            "--seed", str(self.seed), *flags,
        )  # fmt: skip

    def python(self, script: str, *flags: str) -> None:
        """Run one of the scripts as a user would. Raises: FlareError when it fails."""
        print(f"$ python {script} {shlex.join(flags)}", flush=True)
        result = subprocess.run([sys.executable, str(REPO / script), *flags])
        if result.returncode:
            raise FlareError(f"the demo stopped: {script} ended with exit code {result.returncode}")

    def print_summary(self, seconds: float) -> None:
        """Print the table of losses and the paths of the results."""
        from flare.evaluation.report.report import milestones_table

        results = self.read_results()
        print("\n" + milestones_table(results, "embedded"))
        if not self.verdict_was_printed:
            print("\n" + textwrap.fill(results["verdict"], 100))
        print("\n" + textwrap.fill(TOY, 100))
        if not self.with_control:
            print("\ncontrol:      ./run_training.sh demo --control   (a minute more; finished steps are kept)")
        print(f"\nreport:       {self.results.with_name('evaluation_report.md')}")
        print(f"TensorBoard:  tensorboard --logdir={shlex.quote(str(self.demo.tensorboard))}")
        print(f"final model:  {self.demo.final_model}")
        print(f"({seconds:.0f} s)")


if __name__ == "__main__":
    sys.exit(run_script(main))

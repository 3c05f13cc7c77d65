"""Gradient checkpointing none, selective and full: CPU seconds and peak memory of a step, one thread, fp32.

    python -m benchmarks.checkpointing

The three run in turn. CPU seconds are measured, because other work on the machine changes them little.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks import record

SIZES = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True,
}  # fmt: skip
ROWS, SEQ_LEN = 2, 512
MODES = (False, "selective", True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="times each runs [7]")
    args = parser.parse_args(argv)
    found = measure(args.rounds)
    plain = found[0]
    lines = [
        [
            row["gradient_checkpointing"],
            f"{row['cpu_sec']:.2f}",
            f"{row['cpu_sec'] / plain['cpu_sec']:.3f}",
            f"{row['executed_flops'] / plain['executed_flops']:.3f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['planned_bytes'] / row['peak_bytes']:.3f}",
        ]
        for row in found
    ]
    header = ["checkpointing", "CPU s", "CPU s / none", "FLOPs / none", "peak MiB", "plan / peak"]
    print(record.table(header, lines))
    print(f"\n{record.write('checkpointing', {'sizes': SIZES, 'rows': ROWS, 'seq_len': SEQ_LEN, 'modes': found})}")
    return 0


def measure(rounds: int) -> list[dict]:
    """A line for each mode; the peak is beyond the weights, as torch's allocator counts it."""
    import torch

    from benchmarks.allocated import allocated_peak
    from flare.plan.inputs import PlanInputs
    from flare.plan.memory import memory
    from flare.plan.model_shape import ModelShape
    from flare.plan.plan import make_plan

    torch.set_num_threads(1)
    steps = {mode: training_step(mode) for mode in MODES}
    seconds: dict = {mode: [] for mode in MODES}
    for _ in range(rounds + 1):  # the first makes what stays
        for mode, step in steps.items():
            t0 = time.process_time()
            step()
            seconds[mode].append(time.process_time() - t0)
    shape, found = ModelShape.from_config({"model_type": "qwen2", **SIZES}), []
    for mode in MODES:
        inputs = PlanInputs(
            shape, 2, precision="fp32", per_device_batch=ROWS, seq_len=SEQ_LEN, gradient_checkpointing=mode
        )
        need = memory(inputs)
        found.append(
            {
                "gradient_checkpointing": {False: "none", True: "full"}.get(mode, mode),
                "cpu_sec": statistics.median(seconds[mode][1:]),
                "executed_flops": make_plan(inputs).flops.executed,
                "peak_bytes": allocated_peak(steps[mode]),
                "planned_bytes": need.peak_bytes - need.weights - need.optimizer,
            }
        )
    return found


def training_step(mode: bool | str) -> Callable[[], None]:
    """Forward and backward pass of two documents a row, of a random model of these sizes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from flare.model.patches import apply_patches
    from flare.model.training_model import TrainingModel
    from flare.nope.modeling_nope import remove_rope

    torch.manual_seed(0)
    causal_lm = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation="sdpa"))
    remove_rope(causal_lm.model, [3, 4, 5])
    model = TrainingModel(causal_lm).train()
    apply_patches(model, gradient_checkpointing=mode)
    ids = torch.randint(0, SIZES["vocab_size"], (ROWS, SEQ_LEN))
    positions = torch.arange(SEQ_LEN).remainder(SEQ_LEN // 2).repeat(ROWS, 1)

    def step() -> None:
        model(ids, ids, positions).backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    sys.exit(main())

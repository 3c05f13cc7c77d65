"""Training on one CUDA GPU with random weights in true shapes: tokens/s, MFU, peak memory compared with the plan.

    python -m benchmarks.gpu [--only 3B]

HF Trainer with SDPA does the same work as Flare's 3B runs. Each case has its own process, whose peak is
``torch.cuda.max_memory_allocated``. Nothing is downloaded. results/gpu.json is written again after each case, so that
an interruption loses one case. ``--rehearse`` runs the same on a CPU with a tiny model; its numbers mean nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks import record
from benchmarks.workload import Measured, Workload, measure
from flare.errors import EnvError, run_script
from flare.gpus.specs import peak_tflops
from flare.nope.layers import auto_band
from flare.plan.capacity import capacities
from flare.plan.inputs import PlanInputs
from flare.plan.model_shape import ModelShape, known_shape
from flare.plan.plan import Plan, make_plan
from flare.plan.suggest import fits

SEQ_LEN = 4096
MAX_BATCH_SIZE = 4
"""Larger micro-batches than 16,384 tokens are not faster, and their steps take longer."""
STEPS, WARMUP_STEPS = 8, 3
BUDGET_SEC, CASE_LIMIT_SEC = 500.0, 150.0
"""Seconds after which no other case starts, and after which a running case is ended."""

MAX_MICRO_BATCH = 4096
"""Where the search for the largest micro-batch ends."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    model: str
    stage: int
    gradient_checkpointing: bool | str
    trainer: str = "flare"
    compile: bool = False

    def __str__(self) -> str:
        recompute = {False: "", True: ", checkpointing"}.get(self.gradient_checkpointing, ", selective checkpointing")
        name = "Flare" if self.trainer == "flare" else "HF Trainer"
        return f"{self.model} stage {self.stage}{recompute}, {name}{', compiled' if self.compile else ''}"


CASES = [
    Case("Qwen/Qwen2.5-3B", 2, False),
    Case("Qwen/Qwen2.5-3B", 2, False, "hf"),
    Case("Qwen/Qwen2.5-3B", 1, False),
    Case("Qwen/Qwen2.5-3B", 2, False, compile=True),
    Case("Qwen/Qwen2.5-3B", 2, True),
    Case("Qwen/Qwen2.5-3B", 2, "selective"),
    Case("Qwen/Qwen2.5-3B", 2, True, "hf"),
    Case("Qwen/Qwen2.5-7B", 1, False),
    Case("Qwen/Qwen2.5-7B", 1, True),
    Case("Qwen/Qwen2.5-1.5B", 1, False),
    Case("Qwen/Qwen2.5-1.5B", 2, False),
    Case("Qwen/Qwen2.5-0.5B", 1, False),
    Case("Qwen/Qwen2.5-0.5B", 2, False),
]
"""The most important first."""


@dataclass(frozen=True)
class Place:
    """What the cases run on."""

    gpu: str
    memory_mib: int
    device: str = "cuda"
    precision: str = "bf16"
    attention: str = "varlen"  # Flare's
    seq_len: int = SEQ_LEN
    shape_of: Callable[[str], ModelShape] = known_shape


def largest_micro_batch(inputs: PlanInputs, limit_bytes: int) -> int:
    """Most rows of a micro-batch whose peak stays within ``limit_bytes``; 0 when one row is too much."""
    low, high = 0, MAX_MICRO_BATCH + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(replace(inputs, per_device_batch=middle), limit_bytes):
            low = middle
        else:
            high = middle
    return low


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    place, rows, t0 = rehearsal() if args.rehearse else gpu(), [], time.monotonic()
    for case in CASES:
        if args.only not in str(case):
            continue
        if time.monotonic() - t0 > BUDGET_SEC:
            rows.append({"case": str(case), "error": f"not begun within {BUDGET_SEC:.0f} s"})
        else:
            print(case, flush=True)
            rows.append(run(case, place))
        print(" | ".join(line(rows[-1])), flush=True)
        path = record.write("gpu", {"seq_len": place.seq_len, "rehearsal": args.rehearse, "rows": rows})
    header = ["run", "rows", "tokens/s", "MFU", "executed", "peak GiB", "plan GiB", "plan/peak"]
    print("\n" + record.table(header, [line(row) for row in rows]))
    print(f"\n{path if rows else 'no case has that in its name'}")
    return 0


def gpu() -> Place:
    """The first GPU.

    Raises: EnvError without one.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvError("this benchmark needs a CUDA GPU, and torch sees none; see nvidia-smi")
    properties = torch.cuda.get_device_properties(0)
    return Place(properties.name, properties.total_memory >> 20)


def rehearsal() -> Place:
    """A tiny model on the CPU in the place of all models, planned as on an H100."""
    sizes = {
        "model_type": "qwen2", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shape = ModelShape.from_config(sizes)
    return Place("NVIDIA H100 80GB HBM3", 81559, "cpu", "fp32", "sdpa", 64, lambda _: shape)


def planned(case: Case, place: Place) -> Plan | None:
    """The plan of this case with the largest batch that fits the GPU; None when not one row does."""
    shape = place.shape_of(case.model)
    inputs = PlanInputs(
        shape, case.stage, tuple(auto_band(shape.num_hidden_layers)), seq_len=place.seq_len, precision=place.precision,
        gradient_checkpointing=case.gradient_checkpointing, gpus=((place.gpu, place.memory_mib),),
        document_mask=False,
    )  # fmt: skip
    fitting = largest_micro_batch(inputs, capacities(inputs)[0].usable_bytes)
    return make_plan(replace(inputs, per_device_batch=min(fitting, MAX_BATCH_SIZE))) if fitting else None


def run(case: Case, place: Place) -> dict:
    """Measure one case. A failure is reported in the table.

    HF Trainer gets the rows that fit Flare. Where they are too many, for either, half of them are tried, and so on;
    the row says so.
    """
    plan, too_many = planned(case, place), []
    if plan is None:
        return {"case": str(case), "error": "the plan says that one row does not fit"}
    while True:
        try:
            row = numbers(case, plan, measure(workload(case, plan, place), CASE_LIMIT_SEC), peak_tflops(place.gpu))
            return row | ({"out_of_memory_at_rows": too_many} if too_many else {})
        except RuntimeError as error:
            batch = plan.inputs.per_device_batch
            if "out of memory" not in str(error) or batch == 1:
                return {"case": str(case), "error": str(error), "out_of_memory_at_rows": too_many}
            too_many.append(batch)
            plan = make_plan(replace(plan.inputs, per_device_batch=batch // 2))


def workload(case: Case, plan: Plan, place: Place) -> Workload:
    inputs, attention = plan.inputs, place.attention if case.trainer == "flare" else "sdpa"
    return Workload(
        case.trainer, inputs.shape.to_config(), case.stage, list(inputs.nope_layers), inputs.per_device_batch,
        place.seq_len, STEPS, WARMUP_STEPS, place.device, place.precision, case.gradient_checkpointing, attention,
        case.compile,
    )  # fmt: skip


def numbers(case: Case, plan: Plan, measured: Measured, tflops: float | None) -> dict:
    """The row of one measured case. MFU counts 6N for every weight; executed FLOPs are those that Flare runs."""
    rate = measured.tokens_per_sec
    use = {"mfu": plan.flops.model, "executed": plan.flops.executed} if tflops else {}
    return {
        "case": str(case),
        "rows": plan.inputs.per_device_batch,
        "tokens_per_sec": rate,
        **{key: rate * flops / (tflops * 1e12) for key, flops in use.items()},
        "peak_bytes": measured.peak_bytes,
        "plan_bytes": plan.memory.peak_bytes if case.trainer == "flare" else None,
        "step_seconds": measured.step_seconds,
        "losses": measured.losses,
    }


def line(row: dict) -> list[str]:
    """A row of the table; a part that is not known is a dash."""
    if "error" in row:
        return [row["case"], row["error"][:60], *["-"] * 6]
    gib = {key: row[key] / 2**30 if row[key] else None for key in ("peak_bytes", "plan_bytes")}
    share = row["plan_bytes"] / row["peak_bytes"] if row["plan_bytes"] else None
    values = [(row.get("mfu"), ".1%"), (row.get("executed"), ".1%")]
    values += [(gib["peak_bytes"], ".2f"), (gib["plan_bytes"], ".2f"), (share, ".3f")]
    texts = ["-" if value is None else format(value, spec) for value, spec in values]
    return [row["case"], str(row["rows"]), f"{row['tokens_per_sec']:,.0f}", *texts]


if __name__ == "__main__":
    sys.exit(run_script(main))

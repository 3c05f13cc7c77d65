"""Training on one CUDA card with random weights in true shapes: tokens/s, MFU, peak memory against the plan.

    python -m benchmarks.gpu [--only 3B]

Beside each of Flare's runs HF Trainer with SDPA does the same work. Peaks are ``torch.cuda.max_memory_allocated``
of a process of its own; nothing is downloaded.
"""

import argparse
import sys
from dataclasses import dataclass, replace

from benchmarks import record
from benchmarks.workload import Measured, Workload, measure
from flare.errors import EnvError, run_script
from flare.gpus import peak_tflops
from flare.nope.layers import auto_band
from flare.plan import Plan, make_plan
from flare.plan_inputs import PlanInputs
from flare.rooms import rooms
from flare.shapes import known_shape
from flare.suggest import largest_micro_batch

SEQ_LEN = 4096
MAX_BATCH_SIZE = 4
"""More rows at a time win nothing once a micro-batch holds 16,384 tokens, and steps would take longer."""
STEPS, WARMUP_STEPS = 8, 3


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
    Case("Qwen/Qwen2.5-0.5B", 1, False),
    Case("Qwen/Qwen2.5-0.5B", 2, False),
    Case("Qwen/Qwen2.5-1.5B", 1, False),
    Case("Qwen/Qwen2.5-1.5B", 2, False),
    Case("Qwen/Qwen2.5-3B", 1, False),
    Case("Qwen/Qwen2.5-3B", 2, False),
    Case("Qwen/Qwen2.5-3B", 2, False, compile=True),
    Case("Qwen/Qwen2.5-3B", 2, False, "hf"),
    Case("Qwen/Qwen2.5-3B", 2, True),
    Case("Qwen/Qwen2.5-3B", 2, "selective"),
    Case("Qwen/Qwen2.5-3B", 2, True, "hf"),
    Case("Qwen/Qwen2.5-7B", 1, False),
    Case("Qwen/Qwen2.5-7B", 1, True),
]
"""The most telling first: the script has nine minutes."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    args = parser.parse_args(argv)
    name, memory_mib = card()
    rows = [run(case, name, memory_mib) for case in CASES if args.only in str(case)]
    header = ["run", "rows", "tokens/s", "MFU", "executed", "peak GiB", "plan GiB", "plan/peak"]
    print("\n" + record.table(header, [line(row) for row in rows]))
    print(f"\n{record.write('gpu', {'seq_len': SEQ_LEN, 'rows': rows})}")
    return 0


def card() -> tuple[str, int]:
    """(name, memory in MiB) of the first card.

    Raises: EnvError without one.
    """
    import torch

    if not torch.cuda.is_available():
        raise EnvError("this benchmark needs a CUDA card, and torch sees none; see nvidia-smi")
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory >> 20


def planned(case: Case, card_name: str, memory_mib: int) -> Plan | None:
    """The plan of this case with the largest batch that fits the card; None when not one row does."""
    shape = known_shape(case.model)
    inputs = PlanInputs(
        shape, case.stage, tuple(auto_band(shape.num_hidden_layers)), seq_len=SEQ_LEN,
        gradient_checkpointing=case.gradient_checkpointing, gpus=((card_name, memory_mib),), document_mask=False,
    )  # fmt: skip
    fitting = largest_micro_batch(inputs, rooms(inputs)[0].usable_bytes)
    return make_plan(replace(inputs, per_device_batch=min(fitting, MAX_BATCH_SIZE))) if fitting else None


def run(case: Case, card_name: str, memory_mib: int) -> dict:
    """Measure one case; what fails is told in the table, not hidden."""
    print(case, flush=True)
    plan = planned(case, card_name, memory_mib)
    if plan is None:
        return {"case": str(case), "error": "the plan says that one row does not fit"}
    inputs = plan.inputs
    workload = Workload(
        case.trainer, inputs.shape.to_config(), case.stage, list(inputs.nope_layers), inputs.per_device_batch,
        SEQ_LEN, STEPS, WARMUP_STEPS, "cuda", "bf16", case.gradient_checkpointing,
        "varlen" if case.trainer == "flare" else "sdpa", case.compile,
    )  # fmt: skip
    try:
        return numbers(case, plan, measure(workload), peak_tflops(card_name))
    except RuntimeError as error:
        return {"case": str(case), "error": str(error)}


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

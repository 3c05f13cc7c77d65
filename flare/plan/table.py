"""Formats the plan of a run as an aligned table. No torch."""

import math
import textwrap
from collections.abc import Iterator

from flare.nope.layers import format_layers
from flare.plan.balance import balance_summary
from flare.plan.capacity import format_processes, in_gib
from flare.plan.flops import TokenFlops
from flare.plan.inputs import PlanInputs
from flare.plan.plan import Plan, checkpoints_on_disk

WIDTH, LABEL_WIDTH = 80, 16
"""Columns of the table."""


def plan_lines(plan: Plan) -> list[str]:
    """The plan as an aligned table, at most 80 columns wide."""
    return [line for label, text in _table(plan) for line in _wrap(label, text)]


def _table(plan: Plan) -> Iterator[tuple[str, str]]:
    """(label, text) of each row."""
    inputs, shape, trainable = plan.inputs, plan.inputs.shape, plan.inputs.resolved_trainable
    which = "everything" if trainable.everything else str(trainable)
    size = f"{_count(shape.total_params)} parameters, {shape.num_hidden_layers} layers"
    yield "model", f"{shape.name or shape.family}: {size}"
    yield (
        f"stage {inputs.stage}",
        f"trains {_count(plan.trainable_params)} ({which}), frozen {_count(plan.frozen_params)}",
    )
    yield "NoPE layers", format_layers(list(inputs.nope_layers))
    yield "runs in", _runs_in_words(inputs)
    if inputs.precision == "fp16":
        yield "", f"fp16 {inputs.precision_reason}".rstrip()
    yield "batch", _batch_words(plan)
    names = [name for name, _ in inputs.gpus]
    if len(names) == inputs.world_size and (words := balance_summary(inputs.balance, inputs.global_batch_size, names)):
        yield "balance", words
    yield from _flops_rows(plan.flops)
    yield from _memory_rows(plan)
    yield "disk", _disk_words(plan)
    if inputs.steps_left is not None and inputs.tokens_per_sec:
        yield "time", time_words(inputs.steps_left, plan.tokens_per_step, inputs.tokens_per_sec)


def time_words(steps: int, tokens_per_step: int, tokens_per_sec: float) -> str:
    """The time that steps take at a measured rate, without evaluation and saving."""
    minutes = math.ceil(steps * tokens_per_step / tokens_per_sec / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{days} d {hours} h"] if days else [f"{hours} h {minutes} min"] if hours else [f"{minutes} min"]
    return (
        f"{parts[0]} for {steps:,} steps at {tokens_per_sec:,.0f} tokens/s, as the last ones here, without evaluation"
    )


def _runs_in_words(inputs: PlanInputs) -> str:
    parallel = f"FSDP2 over {inputs.shards} processes" if inputs.shards > 1 else "DDP"
    checkpointing = {False: "off", True: "on"}.get(inputs.gradient_checkpointing, inputs.gradient_checkpointing)
    return f"{inputs.precision}, {parallel}, gradient checkpointing {checkpointing}, {inputs.optimizer}"


def _batch_words(plan: Plan) -> str:
    inputs = plan.inputs
    return (
        f"{inputs.per_device_batch} rows x {inputs.accumulation} accumulation x "
        f"{format_processes(inputs.world_size)} = {inputs.global_batch_size} rows of {inputs.seq_len} = "
        f"{plan.tokens_per_step:,} tokens a step"
    )


def _flops_rows(flops: TokenFlops) -> Iterator[tuple[str, str]]:
    def column(name: str, value: int) -> str:
        return _column(name, _flops(value, flops.executed))

    yield "FLOPs/token", column("executed", flops.executed)
    for name in ("frozen_prefix", "frozen_above", "trainable", "attention", "recompute"):
        yield "", column(f"  {name.replace('_', ' ')}", getattr(flops, name))
    yield "", column("model (6N)", flops.model)


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    need = plan.memory
    peak = f"{_column('peak', _bytes(need.peak_bytes, need.peak_bytes))}  {need.peak_phase}"
    yield f"memory/{'GPU' if plan.inputs.gpus else 'process'}", peak
    for name, size in need.parts():
        yield "", _column(f"  {name}", _bytes(size, need.peak_bytes))
    for capacity in plan.capacities:
        total, usable = capacity.total_bytes, capacity.usable_bytes
        spare = usable - need.peak_bytes
        verdict = f"fits, {in_gib(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {in_gib(-spare)} too much"
        yield "", f"{capacity.label}: {in_gib(total)}, {in_gib(usable)} usable: {verdict}"
    if not plan.capacities:
        yield "", "not compared: the size of the memory is not known"


def _disk_words(plan: Plan) -> str:
    inputs, free = plan.inputs, plan.inputs.free_disk_bytes
    text = (
        f"{checkpoints_on_disk(inputs)} x checkpoint {in_gib(plan.checkpoint_bytes)} + final model "
        f"{in_gib(plan.final_model_bytes)} = {in_gib(plan.disk_bytes)}"
    )
    if free is None:
        return text
    text = f"{text}; {in_gib(free)} free"
    if free >= plan.disk_bytes:
        return text
    limit = (free - plan.final_model_bytes) // plan.checkpoint_bytes - 1 - inputs.keeps_best
    cure = f"--save_total_limit {limit} fits" if limit >= 1 else "choose another --base_output_dir"
    return f"{text}: TOO LITTLE, {cure}"


def _column(name: str, value: str) -> str:
    return f"{name:<24}{value:>14}"


def _wrap(label: str, text: str) -> list[str]:
    """One row of the table. Long text is wrapped below itself; columns are not wrapped."""
    is_columns = "  " in text
    pieces = [text] if is_columns else textwrap.wrap(text, WIDTH - LABEL_WIDTH)
    return [f"{label if i == 0 else '':<{LABEL_WIDTH}}{piece}".rstrip() for i, piece in enumerate(pieces)]


def _flops(value: int, largest: int) -> str:
    """FLOPs in a unit that fits the largest number of the column, so that small models do not show zeros."""
    return f"{value / 1e9:.2f} GFLOP" if largest >= 1e8 else f"{value / 1e6:.2f} MFLOP"


def _bytes(value: int, largest: int) -> str:
    return in_gib(value) if largest >= 2**29 else f"{value / 2**20:.1f} MiB"


def _count(params: int) -> str:
    if params >= 1e9:
        return f"{params / 1e9:.2f} B"
    return f"{params / 1e6:.1f} M" if params else "none"

"""Suggestions for a run that does not fit: flag values with the same global batch that fit, if there are any.

Pure functions of ``PlanInputs``; no torch.
"""

import math
from dataclasses import replace

from flare.config.options import SELECTIVE
from flare.plan.capacity import GIB, RESERVE_BYTES, RESERVE_FRACTION, capacities, in_gib
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory
from flare.plan.model_shape import KNOWN_SHAPES
from flare.plan.optimizer_state import EIGHT_BIT
from flare.plan.trainable import Trainable

MAX_GPUS = 64
"""Where the search for enough GPUs ends."""

SHORTEST_SEQ_LEN = 256
"""Shorter rows are never suggested, because that would be a different experiment."""


def fits(inputs: PlanInputs, limit_bytes: int) -> bool:
    """Whether a process's peak stays within ``limit_bytes``."""
    return memory(inputs).peak_bytes <= limit_bytes


def suggest(inputs: PlanInputs, limit_bytes: int | None = None) -> str:
    """Return flag values that fit where ``inputs`` do not, all with the same global batch; '' if ``inputs`` fit.

    Args:
        limit_bytes: limit for a process; None: the memory of its GPU, or its share of the RAM.

    When no choice of batch, row length and checkpointing fits, the text says so and names other changes that would.
    """
    known = capacities(inputs)
    limit = limit_bytes or min((capacity.usable_bytes for capacity in known), default=None)
    if limit is None or fits(inputs, limit):
        return ""
    cheaply, checkpointed = (replace(inputs, gradient_checkpointing=how) for how in (SELECTIVE, True))
    ways = [_smaller_batch(inputs, limit), _fewer_processes(inputs) if known else None, _sharded(inputs, limit)]
    if not inputs.gradient_checkpointing and fits(cheaply, limit):
        ways.append(cheaply)
    elif inputs.gradient_checkpointing is not True:
        ways.append(checkpointed if fits(checkpointed, limit) else _smaller_batch(checkpointed, limit))
    if not any(ways):
        ways.append(_shorter_rows(checkpointed, limit))
    texts = [_flags(inputs, way) for way in ways if way]
    peak = memory(inputs).peak_bytes
    big = [capacity for capacity in known if capacity.usable_bytes >= peak] if limit_bytes is None else []
    texts += [f"only the {' and '.join(capacity.label for capacity in big)} (--gpu_ids)"] if big else []
    return "what fits: " + "; or ".join(texts) if texts else _nothing_fits(inputs, limit)


def _smaller_batch(inputs: PlanInputs, limit_bytes: int) -> PlanInputs | None:
    """Fewer rows at once and more accumulation, the global batch unchanged."""
    rows = inputs.per_device_batch * inputs.accumulation
    for micro in range(inputs.per_device_batch - 1, 0, -1):
        way = replace(inputs, per_device_batch=micro, accumulation=rows // micro)
        if rows % micro == 0 and fits(way, limit_bytes):
            return way
    return None


def _sharded(inputs: PlanInputs, limit_bytes: int) -> PlanInputs | None:
    """The same batch, or a smaller one, with weights, gradients and optimizer state divided among the processes."""
    if inputs.world_size == 1 or inputs.shards > 1:
        return None
    way = replace(inputs, parallel="fsdp")
    return way if fits(way, limit_bytes) else _smaller_batch(way, limit_bytes)


def _fewer_processes(inputs: PlanInputs) -> PlanInputs | None:
    """On the CPU: one process instead of several that share the memory of one host."""
    if inputs.gpus or inputs.world_size == 1 or inputs.processes_per_host not in (None, inputs.world_size):
        return None
    accumulation = inputs.accumulation * inputs.world_size
    way = replace(inputs, world_size=1, processes_per_host=1, accumulation=accumulation)
    return way if fits(way, capacities(way)[0].usable_bytes) else None


def _shorter_rows(inputs: PlanInputs, limit_bytes: int) -> PlanInputs | None:
    """Rows of half the length, a quarter, ..., one at a time."""
    rows = inputs.per_device_batch * inputs.accumulation
    way = replace(inputs, per_device_batch=1, accumulation=rows, seq_len=inputs.seq_len // 2)
    while way.seq_len >= SHORTEST_SEQ_LEN:
        if fits(way, limit_bytes):
            return way
        way = replace(way, seq_len=way.seq_len // 2)
    return None


def _flags(inputs: PlanInputs, way: PlanInputs) -> str:
    """The flags that turn ``inputs`` into ``way``."""
    flags = {
        "--nproc_per_node": (inputs.world_size, way.world_size),
        "--per_device_train_batch_size": (inputs.per_device_batch, way.per_device_batch),
        "--gradient_accumulation_steps": (inputs.accumulation, way.accumulation),
        "--max_seq_length": (inputs.seq_len, way.seq_len),
    }
    words = [f"{flag} {new}" for flag, (old, new) in flags.items() if old != new]
    if way.gradient_checkpointing != inputs.gradient_checkpointing:
        words.append(f"--gradient_checkpointing{'' if way.gradient_checkpointing is True else ' selective'}")
    if way.shards > inputs.shards:
        words.append("--parallel fsdp")
    factor, rest = divmod(way.accumulation, inputs.accumulation)
    more = replace(way, world_size=way.world_size * factor, accumulation=inputs.accumulation)
    if inputs.gpus and factor > 1 and not rest and memory(more).peak_bytes <= memory(way).peak_bytes:
        words.append(f"(or {factor} times as many GPUs instead of more accumulation)")
    return " ".join(words)


def _nothing_fits(inputs: PlanInputs, limit_bytes: int) -> str:
    """The message that no batch, row length and checkpointing fits, with the changes that would."""
    # One row at a time with the same global batch; and the smallest possible run.
    modest = replace(inputs, gradient_checkpointing=True, per_device_batch=1)
    modest = replace(modest, accumulation=inputs.per_device_batch * inputs.accumulation)
    least = replace(modest, accumulation=1, seq_len=SHORTEST_SEQ_LEN)
    place = "GPU" if inputs.gpus else "process"
    ways = []
    for words, fewer in (("nope", False), ("nope_attention", True)):
        way = replace(modest, trainable=Trainable.of(inputs.nope_layers, fewer))
        if inputs.nope_layers and fits(way, limit_bytes):
            ways.append(f"--train_layers {words} ({in_gib(memory(way).peak_bytes)}, 1 row at a time)")
    smaller_state = replace(modest, optimizer=EIGHT_BIT)
    if fits(smaller_state, limit_bytes):
        ways.append(f"--optim {EIGHT_BIT} ({in_gib(memory(smaller_state).peak_bytes)}, 1 row at a time)")
    ways += _more_gpus(modest, limit_bytes)
    needed = math.ceil((memory(modest).peak_bytes + RESERVE_BYTES) / (1 - RESERVE_FRACTION) / GIB)
    ways.append(f"{'GPUs' if inputs.gpus else 'processes'} with {needed} GiB each, 1 row at a time")
    ways += _smaller_model(modest, limit_bytes)
    kept = "with DDP, which keeps all weights, gradients and optimizer state in every {}, however many there are"
    kept = kept.format(place) if inputs.shards == 1 else f"even with all divided among {inputs.shards} processes"
    return (
        f"nothing fits {kept}: 1 row of {SHORTEST_SEQ_LEN} tokens with --gradient_checkpointing needs "
        f"{in_gib(memory(least).peak_bytes)}; what would: {'; or '.join(ways)}"
    )


def _more_gpus(inputs: PlanInputs, limit_bytes: int) -> list[str]:
    """The smallest number of such GPUs on which the run fits with FSDP."""
    for gpus in range(max(2, inputs.shards + 1), MAX_GPUS + 1) if inputs.gpus else ():
        if fits(replace(inputs, parallel="fsdp", world_size=gpus), limit_bytes):
            return [f"{gpus} such GPUs with --parallel fsdp (or auto), 1 row at a time"]
    return []


def _smaller_model(inputs: PlanInputs, limit_bytes: int) -> list[str]:
    """The largest known model of the family that fits, with all or the same fraction of its layers trained."""
    trainable, depth = inputs.resolved_trainable, inputs.shape.num_hidden_layers
    by_size = sorted(KNOWN_SHAPES.items(), key=lambda item: -item[1].total_params)
    for name, shape in by_size:
        if shape.family != inputs.shape.family or shape.total_params >= inputs.shape.total_params:
            continue
        count = math.ceil(len(trainable.layers) * shape.num_hidden_layers / depth)
        top = range(shape.num_hidden_layers - count, shape.num_hidden_layers)
        same = Trainable.of("all" if trainable.everything else top, trainable.attention_only)
        way = replace(inputs, shape=shape, trainable=same)
        if fits(way, limit_bytes):
            return [f"--model_name_or_path {name}"]
    return []

"""The plan of a run, told before anything is loaded: memory by part, FLOPs, disk, and what would fit.

Pure functions over ``PlanInputs``; standard library only. The arithmetic of one layer is in shapes.py; how
the memory formulas come about, and what they were checked against, is in docs/memory.md.
"""

import math
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flare import shapes
from flare.errors import ConfigError, EnvError
from flare.nope.layers import format_layers
from flare.shapes import BF16_BYTES, FP32_BYTES, KNOWN_SHAPES, Microbatch, ModelShape, TokenFlops, Trained

MIB, GIB = 2**20, 2**30

RESERVE_FRACTION, RESERVE_BYTES = 0.06, int(0.7 * GIB)
"""Kept free of a card's memory: fragmentation of the allocator (the share), CUDA context and libraries'
workspaces (the bytes). An estimate until measured on a card. On the CPU, per process: Python and torch."""

LOSS_CHUNK_ROWS = 256
"""Rows of logits at a time: ``flare.loss.CHUNK_ROWS``, which cannot be imported without torch."""

ADAM_STATE_BYTES = 2 * FP32_BYTES
"""AdamW's two fp32 moments, per trainable parameter."""

MAX_MICRO_BATCH = 4096
"""Where the search for the largest micro-batch ends."""

WIDTH, LABEL_WIDTH = 100, 16
"""Columns of the plan's table."""

SHORTEST_SEQ_LEN = 256
"""Below this length no suggestion is made: it would be another experiment."""


@dataclass(frozen=True)
class PlanInputs:
    """All that a plan depends on."""

    shape: ModelShape
    stage: int = 1
    nope_layers: tuple[int, ...] = ()
    trainable_layers: Collection[int] | Literal["all"] | None = None  # None: stage 1 nope_layers, stage 2 all
    attention_only: bool = False  # --train_layers nope_attention
    precision: Literal["bf16", "fp32"] = "bf16"
    world_size: int = 1  # processes on all hosts, one a card
    per_device_batch: int = 1  # rows of a micro-batch
    accumulation: int = 1  # micro-batches of an optimizer step
    seq_len: int = 4096  # tokens of a row
    gradient_checkpointing: bool = False
    gpus: tuple[tuple[str, int | None], ...] = ()  # (name, memory_total_mib or None if unknown); empty: CPU
    optimizer: str = "adamw_torch_fused"
    attn_implementation: str = "sdpa"  # or eager
    document_mask: bool = True  # attention is told document bounds by a mask, as SDPA is for packed rows
    save_total_limit: int | None = 3  # None: every checkpoint is kept
    keeps_best: bool = False  # the best checkpoint is kept whatever its age (early stopping)
    num_saves: int | None = None  # checkpoints that the whole run writes, where known
    free_disk_bytes: int | None = None  # in the output directory
    available_ram_bytes: int | None = None  # CPU runs, see read_available_ram
    processes_per_host: int | None = None  # CPU runs; None: all of them

    def __post_init__(self) -> None:
        assert self.precision in ("bf16", "fp32"), self.precision
        assert min(self.world_size, self.per_device_batch, self.accumulation, self.seq_len) >= 1, self

    @property
    def trained(self) -> Trained:
        layers = self.trainable_layers
        if layers is None:
            layers = self.nope_layers if self.stage == 1 else "all"
        return Trained.of(layers, self.attention_only)

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def microbatch(self) -> Microbatch:
        return Microbatch(
            rows=self.per_device_batch,
            seq_len=self.seq_len,
            bf16=self.bf16,
            fp32_residual=self.trained.everything,
            document_mask=self.document_mask,
            eager_attention=self.attn_implementation == "eager",
        )

    @property
    def global_batch_size(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device_batch * self.accumulation * self.world_size

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a frozen weight."""
        return BF16_BYTES if self.bf16 else FP32_BYTES


# --- memory of one process ---


@dataclass(frozen=True)
class Memory:
    """Bytes on one card (or of one CPU process), by part; each part at its own largest.

    The parts are not all at their largest at once, so ``peak_bytes`` is at most their sum.
    """

    weights: int  # frozen in bf16 on bf16 runs, trainable as fp32 masters
    weight_copies: int  # bf16 copies of trainable matmul weights that autocast caches
    gradients: int  # fp32, of trainable parameters
    optimizer: int  # AdamW's moments, and what its update needs for a moment
    activations: int  # what autograd saves from the forward to the backward pass
    working: int  # of one layer at a time: recomputed activations, gradients of activations
    logits: int  # one chunk of the loss, with the gradients that it makes
    peak_bytes: int
    peak_phase: str


@dataclass(frozen=True)
class _Layer:
    """Bytes of one decoder layer that has a backward pass."""

    kept: int  # activations from forward to backward
    rerun: int  # saved again by the recomputation (0 without checkpointing)
    copies: int  # autocast's copies of its trainable weights
    gradients: int
    first_gradient: int  # down_proj's, the first to appear
    transient: int  # gradients of activations while its backward pass runs


def memory(inputs: PlanInputs, parallel: Literal["ddp", "fsdp"] = "ddp") -> Memory:
    """Peak memory of one process.

    ddp: everything on every card; the reduction buckets are the gradients (gradient_as_bucket_view).
    fsdp: weights, gradients and optimizer state divided by the world size, one unit gathered in bf16.
    """
    trained, shape, batch = inputs.trained, inputs.shape, inputs.microbatch
    shards = inputs.world_size if parallel == "fsdp" else 1
    params = trained.params(shape)
    gradients = FP32_BYTES * params // shards
    weights = (inputs.frozen_bytes * (shape.total_params - params) + FP32_BYTES * params) // shards
    moments = ADAM_STATE_BYTES * params // shards
    with_backward = range(trained.first_backward(shape), shape.num_hidden_layers)
    layers = [_layer(inputs, layer_idx, shards) for layer_idx in with_backward]
    gathered = _gathered_bytes(inputs) if shards > 1 else 0
    phases = dict(_phases(inputs, layers, gradients, shards))
    phase = max(phases, key=phases.__getitem__)
    copies = sum(layer.copies for layer in layers)
    return Memory(
        weights=weights,
        weight_copies=gathered or copies,
        gradients=gradients,
        optimizer=moments + _update_bytes(inputs, shards),
        activations=sum(layer.kept for layer in layers)
        + _held_bytes(inputs)
        + shapes.final_norm_saved_bytes(shape, batch, trained),
        working=max((layer.rerun + layer.transient for layer in layers), default=0),
        logits=loss_bytes(shape, batch, trained.everything) + _final_hidden_bytes(shape, batch),
        peak_bytes=weights + moments + gathered + phases[phase],
        peak_phase=phase,
    )


def _layer(inputs: PlanInputs, layer_idx: int, shards: int) -> _Layer:
    shape, batch, trained = inputs.shape, inputs.microbatch, inputs.trained
    saved = shapes.layer_saved_bytes(shape, batch, trained, layer_idx)
    params = trained.attention(layer_idx) * shape.attention_params
    params += trained.mlp(layer_idx) * (shape.mlp_params + shape.norm_params)
    copied = trained.matmul_params(shape, layer_idx) if inputs.bf16 and shards == 1 else 0
    own_input = shapes.layer_input_bytes(shape, batch)
    # An fp32 input is itself what the recomputed norm saves: counted once.
    input_saved = batch.residual_bytes == FP32_BYTES and (
        trained.everything or layer_idx > trained.first_backward(shape)
    )
    return _Layer(
        kept=own_input if inputs.gradient_checkpointing else saved,
        rerun=saved - input_saved * own_input if inputs.gradient_checkpointing else 0,
        copies=BF16_BYTES * copied,
        gradients=FP32_BYTES * params // shards,
        first_gradient=FP32_BYTES * trained.mlp(layer_idx) * shape.mlp_params // 3 // shards,
        transient=shapes.backward_transient_bytes(shape, batch, trained.mlp(layer_idx)),
    )


def _phases(
    inputs: PlanInputs,
    layers: list[_Layer],
    gradients: int,
    shards: int,
) -> Iterator[tuple[str, int]]:
    """(moment of a step, bytes alive then beyond weights and moments), for each moment that may be the peak.

    Gradients are there from the start when they outlive a backward pass: in DDP's buckets, or while
    micro-batches accumulate. Else they grow, layer by layer from the top, while activations go.
    """
    shape, batch, trained = inputs.shape, inputs.microbatch, inputs.trained
    persistent = gradients if inputs.accumulation > 1 or (inputs.world_size > 1 and shards == 1) else 0
    first, held = trained.first_backward(shape), _held_bytes(inputs)
    shared = held + shapes.final_norm_saved_bytes(shape, batch, trained)
    kept = sum(layer.kept for layer in layers)
    copies = sum(layer.copies for layer in layers)
    # Checkpointed layers save no copies, but autocast's cache holds all of them until the forward pass ends.
    graph_copies = 0 if inputs.gradient_checkpointing else copies
    forward = shapes.forward_transient_bytes(shape, batch)
    yield "end of the forward pass", persistent + kept + copies + shared + forward
    chunk = loss_bytes(shape, batch, trained.everything) + _final_hidden_bytes(shape, batch)
    yield "loss", persistent + kept + graph_copies + shared + chunk
    grown = FP32_BYTES * shape.embedding_params // shards if trained.everything else 0
    for index in reversed(range(len(layers))):
        layer = layers[index]
        below = sum(x.kept + (x.copies if graph_copies else 0) for x in layers[: index + 1])
        own = layer.rerun + (0 if graph_copies else layer.copies) + layer.transient
        alive = persistent or grown + layer.first_gradient
        yield f"backward of layer {first + index}", alive + below + own + held
        grown += layer.gradients
    # The embedding's gradient is dense and, when tied, is added to the head's.
    embedding = FP32_BYTES * shape.embedding_params if trained.everything and shape.tie_word_embeddings else 0
    yield "end of the backward pass", gradients + embedding
    yield "optimizer update", gradients + _update_bytes(inputs, shards)


def _held_bytes(inputs: PlanInputs) -> int:
    """Alive all through the backward pass: cos and sin, and the boolean mask that checkpoints hold on to."""
    batch = inputs.microbatch
    mask = batch.mask_elements if inputs.gradient_checkpointing else 0
    return shapes.rotary_bytes(inputs.shape, batch) + mask


def _final_hidden_bytes(shape: ModelShape, batch: Microbatch) -> int:
    return batch.compute_bytes * batch.tokens * shape.hidden_size


def _update_bytes(inputs: PlanInputs, shards: int) -> int:
    """What an optimizer update allocates: nothing when fused, else temporaries of one tensor at a time."""
    if inputs.optimizer == "adamw_torch_fused":
        return 0
    shape, trained = inputs.shape, inputs.trained
    largest = shape.query_size * shape.hidden_size
    if not trained.attention_only:
        largest = shape.intermediate_size * shape.hidden_size
    if trained.everything:
        largest = max(largest, shape.embedding_params)
    return 2 * FP32_BYTES * largest // shards


def _gathered_bytes(inputs: PlanInputs) -> int:
    """FSDP's largest unit, whole: its weights in the compute dtype, and a trainable one's fp32 gradient."""
    shape, trained = inputs.shape, inputs.trained
    unit = max(shape.layer_params, shape.embedding_params)
    trainable_unit = unit if trained.everything else shape.layer_params
    return inputs.frozen_bytes * unit + FP32_BYTES * trainable_unit


def loss_bytes(shape: ModelShape, batch: Microbatch, head_trains: bool) -> int:
    """Peak of ``flare.loss.linear_cross_entropy_sum`` beyond its inputs: C rows of V logits at a time.

    fp32: torch's linear_cross_entropy makes all gradients in its forward pass: of the hidden states (N, H),
    and of the weight (V, H) when it trains; beside them logits (C, V) and scaled inputs (C, H), or in its
    backward pass as many zeros as gradients, which torch puts in for the outputs that nothing uses.
    bf16: checkpointed chunks; log_softmax and two gradients of it (C, V) in fp32, or further on the casts of
    one gradient, beside the chunk's and the summed weight gradient (V, H), all in bf16, and the bf16 copy of
    the fp32 weight.
    """
    rows = min(LOSS_CHUNK_ROWS, batch.tokens)
    chunk, hidden = rows * shape.vocab_size, batch.tokens * shape.hidden_size
    weight = shape.embedding_params
    if not batch.bf16:
        gradients = hidden + (weight if head_trains else 0)
        return FP32_BYTES * (gradients + max(chunk + rows * shape.hidden_size, gradients))
    softmax = 3 * FP32_BYTES * chunk
    if not head_trains:
        return softmax + BF16_BYTES * hidden
    casts = (FP32_BYTES + BF16_BYTES) * chunk
    return max(softmax + 2 * BF16_BYTES * weight, casts + 3 * BF16_BYTES * weight) + BF16_BYTES * hidden


# --- the plan ---


@dataclass(frozen=True)
class Room:
    """Memory that one process may use, on cards of one kind or on the CPU."""

    label: str
    total_bytes: int
    usable_bytes: int


@dataclass(frozen=True)
class Plan:
    """A run in numbers."""

    inputs: PlanInputs
    trainable_params: int
    frozen_params: int
    tokens_per_step: int  # of an optimizer step, all processes together
    flops: TokenFlops
    memory: Memory
    rooms: tuple[Room, ...]  # where the memory is known
    checkpoint_bytes: int
    final_model_bytes: int
    disk_bytes: int  # at the fullest moment

    @property
    def tight_rooms(self) -> list[Room]:
        """Those that cannot hold the peak."""
        return [room for room in self.rooms if room.usable_bytes < self.memory.peak_bytes]

    @property
    def fits(self) -> bool | None:
        """Whether every card holds its share; None when no card's memory is known."""
        return not self.tight_rooms if self.rooms else None

    def lines(self) -> list[str]:
        """The plan as an aligned table, at most 100 columns wide."""
        return [line for label, text in _table(self) for line in _wrap(label, text)]


def make_plan(inputs: PlanInputs) -> Plan:
    """All numbers of a run. Nothing is read, loaded or refused here: see ``check_fits``."""
    trained, shape = inputs.trained, inputs.shape
    trainable = trained.params(shape)
    frozen = shape.total_params - trainable
    checkpoint = inputs.frozen_bytes * frozen + (FP32_BYTES + ADAM_STATE_BYTES) * trainable
    final_model = inputs.frozen_bytes * shape.total_params
    return Plan(
        inputs=inputs,
        trainable_params=trainable,
        frozen_params=frozen,
        tokens_per_step=inputs.global_batch_size * inputs.seq_len,
        flops=shapes.token_flops(
            shape, trained, inputs.seq_len, inputs.gradient_checkpointing, loss_recompute=inputs.bf16
        ),
        memory=memory(inputs),
        rooms=rooms(inputs),
        checkpoint_bytes=checkpoint,
        final_model_bytes=final_model,
        disk_bytes=checkpoint * checkpoints_on_disk(inputs) + final_model,
    )


def checkpoints_on_disk(inputs: PlanInputs) -> int:
    """Checkpoints at the fullest moment: the new one is whole before the oldest goes."""
    if inputs.save_total_limit is None:
        return inputs.num_saves or 1
    most = inputs.save_total_limit + 1 + inputs.keeps_best
    return most if inputs.num_saves is None else min(most, inputs.num_saves)


def usable_bytes(total_bytes: int) -> int:
    """What a run may take of a card's (or a CPU process's) memory."""
    return max(0, int(total_bytes * (1 - RESERVE_FRACTION)) - RESERVE_BYTES)


def rooms(inputs: PlanInputs) -> tuple[Room, ...]:
    """One entry for each kind of card whose memory is known, or one for the CPU."""
    if inputs.gpus:
        kinds = Counter(inputs.gpus).items()
        known = [(f"{n} x {name}", mib * MIB) for (name, mib), n in kinds if mib is not None]
        return tuple(Room(label, total, usable_bytes(total)) for label, total in known)
    if inputs.available_ram_bytes is None:
        return ()
    processes = inputs.processes_per_host or inputs.world_size
    share = inputs.available_ram_bytes // processes
    return (Room(f"CPU, {_processes(processes)}", share, usable_bytes(share)),)


def read_available_ram(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that programs can still take on this machine; None where the kernel does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return int(match[1]) * 1024 if match else None


# --- what would fit ---


def fits(inputs: PlanInputs, limit_bytes: int) -> bool:
    """Whether a process's peak stays within ``limit_bytes``."""
    return memory(inputs).peak_bytes <= limit_bytes


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


def suggest(inputs: PlanInputs) -> str:
    """Flag values that would fit where ``inputs`` do not, all with the same global batch; '' if they fit.

    When no choice of batch, row length and checkpointing fits, it says so, and what else would do.
    """
    known = rooms(inputs)
    limit = min((room.usable_bytes for room in known), default=None)
    if limit is None or fits(inputs, limit):
        return ""
    checkpointed = replace(inputs, gradient_checkpointing=True)
    ways = [_smaller_batch(inputs, limit), _fewer_processes(inputs)]
    if not inputs.gradient_checkpointing:
        ways.append(checkpointed if fits(checkpointed, limit) else _smaller_batch(checkpointed, limit))
    if not any(ways):
        ways.append(_shorter_rows(checkpointed, limit))
    texts = [_flags(inputs, way) for way in ways if way]
    big = [room for room in known if room.usable_bytes >= memory(inputs).peak_bytes]
    texts += [f"only the {' and '.join(room.label for room in big)} (--gpu_ids)"] if big else []
    return "what fits: " + "; or ".join(texts) if texts else _nothing_fits(inputs, limit)


def _smaller_batch(inputs: PlanInputs, limit_bytes: int) -> PlanInputs | None:
    """Fewer rows at once and more accumulation, the global batch unchanged."""
    rows = inputs.per_device_batch * inputs.accumulation
    for micro in range(inputs.per_device_batch - 1, 0, -1):
        way = replace(inputs, per_device_batch=micro, accumulation=rows // micro)
        if rows % micro == 0 and fits(way, limit_bytes):
            return way
    return None


def _fewer_processes(inputs: PlanInputs) -> PlanInputs | None:
    """On the CPU: one process instead of several that share the memory of one host."""
    if inputs.gpus or inputs.world_size == 1 or inputs.processes_per_host not in (None, inputs.world_size):
        return None
    accumulation = inputs.accumulation * inputs.world_size
    way = replace(inputs, world_size=1, processes_per_host=1, accumulation=accumulation)
    return way if fits(way, rooms(way)[0].usable_bytes) else None


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
    if way.gradient_checkpointing and not inputs.gradient_checkpointing:
        words.append("--gradient_checkpointing")
    factor, rest = divmod(way.accumulation, inputs.accumulation)
    more = replace(way, world_size=way.world_size * factor, accumulation=inputs.accumulation)
    if inputs.gpus and factor > 1 and not rest and memory(more).peak_bytes <= memory(way).peak_bytes:
        words.append(f"(or {factor} times as many cards instead of more accumulation)")
    return " ".join(words)


def _nothing_fits(inputs: PlanInputs, limit_bytes: int) -> str:
    """The plain word that these weights are too much for this card, and what would not be."""
    # One row at a time, the global batch kept; and the least that is still a run.
    modest = replace(inputs, gradient_checkpointing=True, per_device_batch=1)
    modest = replace(modest, accumulation=inputs.per_device_batch * inputs.accumulation)
    least = replace(modest, accumulation=1, seq_len=SHORTEST_SEQ_LEN)
    place = "card" if inputs.gpus else "process"
    ways = []
    for words, fewer in (("nope", False), ("nope_attention", True)):
        way = replace(modest, trainable_layers=inputs.nope_layers, attention_only=fewer)
        if inputs.nope_layers and fits(way, limit_bytes):
            ways.append(f"--train_layers {words} ({_gib(memory(way).peak_bytes)}, 1 row at a time)")
    needed = math.ceil((memory(modest).peak_bytes + RESERVE_BYTES) / (1 - RESERVE_FRACTION) / GIB)
    ways.append(f"{'cards' if inputs.gpus else 'processes'} with {needed} GiB each, 1 row at a time")
    ways += _smaller_model(modest, limit_bytes)
    return (
        f"nothing fits with DDP, which keeps all weights, gradients and optimizer state in every {place}, "
        f"however many there are: even 1 row of {SHORTEST_SEQ_LEN} tokens with --gradient_checkpointing "
        f"needs {_gib(memory(least).peak_bytes)}; what would: {'; or '.join(ways)}"
    )


def _smaller_model(inputs: PlanInputs, limit_bytes: int) -> list[str]:
    """The largest known model of the family that fits, training all of it or the same share of layers."""
    depth = inputs.shape.num_hidden_layers
    by_size = sorted(KNOWN_SHAPES.items(), key=lambda item: -item[1].total_params)
    for name, shape in by_size:
        if shape.family != inputs.shape.family or shape.total_params >= inputs.shape.total_params:
            continue
        count = math.ceil(len(inputs.trained.layers) * shape.num_hidden_layers / depth)
        top = range(shape.num_hidden_layers - count, shape.num_hidden_layers)
        way = replace(inputs, shape=shape, trainable_layers="all" if inputs.trained.everything else top)
        if fits(way, limit_bytes):
            return [f"--model_name_or_path {name}"]
    return []


def check_fits(plan: Plan) -> None:
    """Refuse, before anything is loaded, what a known card or the disk cannot hold.

    Raises:
        ConfigError: too little memory; with the numbers and the flag values that would fit.
        EnvError: not even one checkpoint fits on the disk.
    """
    inputs, need = plan.inputs, plan.memory
    tight = plan.tight_rooms
    if tight:
        room = min(tight, key=lambda r: r.usable_bytes)
        visible = [(name, size) for name, size in memory_parts(need) if size >= 0.01 * GIB]
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in visible)
        raise ConfigError(
            f"stage {inputs.stage} of {inputs.shape.name or 'this model'} does not fit on {room.label}: "
            f"needs {_gib(need.peak_bytes)} of {_gib(room.total_bytes)} ({_gib(room.usable_bytes)} usable) "
            f"per {'card' if inputs.gpus else 'process'}: {parts}; {suggest(inputs)}"
        )
    if inputs.free_disk_bytes is not None and inputs.free_disk_bytes < plan.checkpoint_bytes:
        raise EnvError(
            f"a checkpoint takes {_gib(plan.checkpoint_bytes)}, and the output directory has "
            f"{_gib(inputs.free_disk_bytes)} free; free some space or choose another --base_output_dir"
        )


# --- words ---


def memory_parts(need: Memory) -> list[tuple[str, int]]:
    """(name, bytes) of each part, in the order of the table."""
    return [
        ("weights", need.weights),
        ("bf16 copies", need.weight_copies),
        ("gradients", need.gradients),
        ("optimizer", need.optimizer),
        ("activations", need.activations),
        ("one layer's backward", need.working),
        ("logits", need.logits),
    ]


def _table(plan: Plan) -> Iterator[tuple[str, str]]:
    """(label, text) of each row."""
    inputs, shape, trained = plan.inputs, plan.inputs.shape, plan.inputs.trained
    which = "everything" if trained.everything else f"layers {format_layers(sorted(trained.layers))}"
    which = f"attention of {which}" if trained.attention_only and not trained.everything else which
    size = f"{_count(shape.total_params)} parameters, {shape.num_hidden_layers} layers"
    yield "model", f"{shape.name or shape.family}: {size}"
    yield (
        f"stage {inputs.stage}",
        f"trains {_count(plan.trainable_params)} ({which}), frozen {_count(plan.frozen_params)}",
    )
    yield "NoPE layers", format_layers(list(inputs.nope_layers))
    checkpointing = "on" if inputs.gradient_checkpointing else "off"
    yield "runs in", f"{inputs.precision}, DDP, gradient checkpointing {checkpointing}, {inputs.optimizer}"
    yield "batch", _batch_words(plan)
    yield from _flops_rows(plan.flops)
    yield from _memory_rows(plan)
    yield "disk", _disk_words(plan)


def _batch_words(plan: Plan) -> str:
    inputs = plan.inputs
    return (
        f"{inputs.per_device_batch} rows x {inputs.accumulation} accumulation x "
        f"{_processes(inputs.world_size)} = {inputs.global_batch_size} rows of {inputs.seq_len} = "
        f"{plan.tokens_per_step:,} tokens a step"
    )


def _flops_rows(flops: TokenFlops) -> Iterator[tuple[str, str]]:
    yield "FLOPs/token", _column("executed", _giga(flops.executed))
    for name in ("frozen_prefix", "frozen_above", "trainable", "attention", "recompute"):
        yield "", _column(f"  {name.replace('_', ' ')}", _giga(getattr(flops, name)))
    yield "", _column("model (6N)", _giga(flops.model))


def _memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    need = plan.memory
    peak = f"{_column('peak', _gib(need.peak_bytes))}  {need.peak_phase}"
    yield f"memory/{'card' if plan.inputs.gpus else 'process'}", peak
    for name, size in memory_parts(need):
        yield "", _column(f"  {name}", _gib(size))
    for room in plan.rooms:
        spare = room.usable_bytes - need.peak_bytes
        verdict = f"fits, {_gib(spare)} to spare" if spare >= 0 else f"DOES NOT FIT, {_gib(-spare)} too much"
        yield "", f"{room.label}: {_gib(room.total_bytes)}, {_gib(room.usable_bytes)} usable: {verdict}"
    if not plan.rooms:
        yield "", "not compared: how much memory there is, is not known"


def _disk_words(plan: Plan) -> str:
    inputs, free = plan.inputs, plan.inputs.free_disk_bytes
    text = (
        f"{checkpoints_on_disk(inputs)} x checkpoint {_gib(plan.checkpoint_bytes)} + final model "
        f"{_gib(plan.final_model_bytes)} = {_gib(plan.disk_bytes)}"
    )
    if free is None:
        return text
    text = f"{text}; {_gib(free)} free"
    if free >= plan.disk_bytes:
        return text
    limit = (free - plan.final_model_bytes) // plan.checkpoint_bytes - 1 - inputs.keeps_best
    cure = f"--save_total_limit {limit} fits" if limit >= 1 else "choose another --base_output_dir"
    return f"{text}: TOO LITTLE, {cure}"


def _column(name: str, value: str) -> str:
    return f"{name:<24}{value:>14}"


def _wrap(label: str, text: str) -> list[str]:
    """One row of the table; long text goes on under itself, columns stay as they are."""
    is_columns = "  " in text
    pieces = [text] if is_columns else textwrap.wrap(text, WIDTH - LABEL_WIDTH)
    return [f"{label if i == 0 else '':<{LABEL_WIDTH}}{piece}".rstrip() for i, piece in enumerate(pieces)]


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.2f} GFLOP"


def _count(params: int) -> str:
    if params >= 1e9:
        return f"{params / 1e9:.2f} B"
    return f"{params / 1e6:.1f} M" if params else "none"

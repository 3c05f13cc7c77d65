"""Memory that one process of a run needs at its peak, by part: weights, optimizer, activations, loss.

Pure functions over ``PlanInputs``; no torch. The activations of one layer are in activations.py, the memory
that there is in rooms.py. How the formulas come about, and what they were checked against, is in
docs/memory.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flare.config.options import SELECTIVE
from flare.plan import activations
from flare.plan.activations import Microbatch
from flare.plan.inputs import PlanInputs
from flare.plan.loss_chunks import CPU_BLOCK_ROWS, cpu_softmax_rows, loss_chunk_rows
from flare.plan.model_shape import FP32_BYTES, HALF_BYTES, ModelShape
from flare.plan.optimizer_state import COMPILED_UPDATE_BYTES, EAGER_UPDATE_BYTES, EIGHT_BIT, parameter_state_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU (or of one CPU process), by part; each part at its own largest.

    The parts are not all at their largest at once, so ``peak_bytes`` is at most their sum.
    """

    weights: int  # frozen in bf16 on bf16 runs (fp16 on fp16 ones), trainable as fp32 masters
    weight_copies: int  # 16-bit ones of trainable matmul weights that autocast caches; FSDP2's gathered weights
    gradients: int  # fp32, of trainable parameters
    optimizer: int  # AdamW's moments, and what its update needs for a moment
    activations: int  # what autograd saves from the forward to the backward pass
    working: int  # of one layer at a time: recomputed activations, gradients of activations
    logits: int  # one chunk of the loss, with the gradients that it makes
    peak_bytes: int
    peak_phase: str
    sharded: bool = False  # all but activations, working and logits is divided among the ranks

    def parts(self) -> list[tuple[str, int]]:
        """(name, bytes) of each part, in the order of the table."""
        return [
            ("weights", self.weights),
            ("gathered weights" if self.sharded else "copies in 16 bits", self.weight_copies),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("one layer's backward", self.working),
            ("logits", self.logits),
        ]


@dataclass(frozen=True)
class _Layer:
    """Bytes of one decoder layer that has a backward pass."""

    kept: int  # activations from forward to backward
    rerun: int  # saved again by the recomputation (0 without checkpointing)
    copies: int  # autocast's copies of its trainable weights
    gradients: int
    first_gradient: int  # down_proj's, the first to appear
    transient: int  # gradients of activations while its backward pass runs


def memory(inputs: PlanInputs) -> Memory:
    """Peak memory of one process.

    ddp: everything on every GPU; the reduction buckets are the gradients (gradient_as_bucket_view).
    fsdp: weights, gradients and optimizer state divided by the world size, and what is gathered (gathered.py).
    """
    trainable, shape, batch = inputs.resolved_trainable, inputs.shape, inputs.microbatch
    shards = inputs.shards
    params = trainable.params(shape)
    gradients = FP32_BYTES * params // shards
    weights = (inputs.frozen_bytes * (shape.total_params - params) + FP32_BYTES * params) // shards
    moments = optimizer_state_bytes(inputs, shards)
    with_backward = range(trainable.first_backward(shape), shape.num_hidden_layers)
    layers = [_layer(inputs, layer_idx, shards) for layer_idx in with_backward]
    buffers = fsdp_buffers(inputs)
    phases = dict(_phases(inputs, layers, gradients, shards))
    phase = max(phases, key=phases.__getitem__)
    copies = sum(layer.copies for layer in layers)
    return Memory(
        weights=weights,
        weight_copies=max(buffers.forward, buffers.backward) or copies,
        gradients=gradients,
        optimizer=moments + _update_bytes(inputs, shards),
        activations=sum(layer.kept for layer in layers)
        + _held_bytes(inputs)
        + activations.final_norm_saved_bytes(shape, batch),
        working=max((layer.rerun + layer.transient for layer in layers), default=0),
        logits=loss_bytes(shape, batch, trainable.everything, bool(inputs.gpus)) + _final_hidden_bytes(shape, batch),
        peak_bytes=weights + moments + phases[phase],
        peak_phase=phase,
        sharded=shards > 1,
    )


def _layer(inputs: PlanInputs, layer_idx: int, shards: int) -> _Layer:
    shape, batch, trainable = inputs.shape, inputs.microbatch, inputs.resolved_trainable
    saved = activations.layer_saved_bytes(shape, batch, trainable, layer_idx)
    params = trainable.attention(layer_idx) * shape.attention_params
    params += trainable.mlp(layer_idx) * (shape.mlp_params + shape.norm_params)
    copied = trainable.matmul_params(shape, layer_idx) if inputs.half and shards == 1 else 0
    own_input = activations.layer_input_bytes(shape, batch)
    kept, rerun = saved, 0
    if inputs.gradient_checkpointing:
        products = activations.selective_saved_bytes(shape, batch) * (inputs.gradient_checkpointing == SELECTIVE)
        # The input is itself what the first norm saves: counted once.
        first = layer_idx == trainable.first_backward(shape)
        input_saved = trainable.everything or not first or trainable.mlp(layer_idx)
        kept, rerun = own_input + products, saved - input_saved * own_input - products
    return _Layer(
        kept=kept,
        rerun=rerun,
        copies=HALF_BYTES * copied,
        gradients=FP32_BYTES * params // shards,
        first_gradient=FP32_BYTES * trainable.mlp(layer_idx) * shape.mlp_params // 3 // shards,
        transient=activations.backward_transient_bytes(shape, batch, trainable.mlp(layer_idx)),
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
    shape, batch, trainable = inputs.shape, inputs.microbatch, inputs.resolved_trainable
    persistent = gradients if inputs.accumulation > 1 or (inputs.world_size > 1 and shards == 1) else 0
    first, held, buffers = trainable.first_backward(shape), _held_bytes(inputs), fsdp_buffers(inputs)
    shared = held + activations.final_norm_saved_bytes(shape, batch)
    kept = sum(layer.kept for layer in layers)
    copies = sum(layer.copies for layer in layers)
    # Checkpointed layers save no copies, but autocast's cache holds all of them until the forward pass ends.
    graph_copies = 0 if inputs.gradient_checkpointing else copies
    forward = activations.forward_transient_bytes(shape, batch, bool(inputs.gradient_checkpointing))
    yield "end of the forward pass", persistent + kept + copies + shared + forward + buffers.forward
    chunk = loss_bytes(shape, batch, trainable.everything, bool(inputs.gpus)) + _final_hidden_bytes(shape, batch)
    yield "loss", persistent + kept + graph_copies + shared + chunk + buffers.loss
    grown = FP32_BYTES * shape.embedding_params // shards if trainable.everything else 0
    # The embedding's gradient is dense and, when tied, is added to the head's, which waits for it; the sum of both
    # is then added to a gradient that is there already.
    tied = trainable.everything and shape.tie_word_embeddings and shards == 1
    embedding = FP32_BYTES * shape.embedding_params if tied else 0
    waiting = embedding if persistent else 0
    for index in reversed(range(len(layers))):
        layer = layers[index]
        below = sum(x.kept + (x.copies if graph_copies else 0) for x in layers[: index + 1])
        own = layer.rerun + (0 if graph_copies else layer.copies) + layer.transient
        alive = persistent + waiting if persistent else grown + layer.first_gradient
        yield f"backward of layer {first + index}", alive + below + own + held + buffers.backward
        grown += layer.gradients
    yield "end of the backward pass", gradients + embedding + waiting + buffers.end
    yield "optimizer update", gradients + _update_bytes(inputs, shards)


def _held_bytes(inputs: PlanInputs) -> int:
    """Alive all through the backward pass: cos and sin, and the boolean mask that checkpoints hold on to."""
    batch = inputs.microbatch
    mask = batch.mask_elements if inputs.gradient_checkpointing else 0
    return activations.rotary_bytes(inputs.shape, batch) + mask


def _final_hidden_bytes(shape: ModelShape, batch: Microbatch) -> int:
    return batch.compute_bytes * batch.tokens * shape.hidden_size


def optimizer_state_bytes(inputs: PlanInputs, shards: int = 1) -> int:
    """AdamW's two moments of all that trains, on one of ``shards`` ranks."""
    tensors = inputs.resolved_trainable.tensors(inputs.shape)
    return sum(parameter_state_bytes(tensor, inputs.optimizer, shards) for tensor in tensors)


def _update_bytes(inputs: PlanInputs, shards: int) -> int:
    """What an optimizer update allocates: nothing when fused, else temporaries of one tensor at a time."""
    if inputs.optimizer == "adamw_torch_fused":
        return 0
    each = 2 * FP32_BYTES
    if inputs.optimizer == EIGHT_BIT:
        each = COMPILED_UPDATE_BYTES if inputs.gpus else EAGER_UPDATE_BYTES
    return each * max(map(math.prod, inputs.resolved_trainable.tensors(inputs.shape)), default=0) // shards


def loss_bytes(shape: ModelShape, batch: Microbatch, head_trains: bool, on_gpu: bool = False) -> int:
    """Peak of ``linear_cross_entropy_sum`` beyond its inputs: C rows of V logits at a time.

    Gradients of the hidden states (N, H), in their dtype (fp16: in fp32), and of the weight (V, H), in fp32, when it
    trains. Beside them a chunk's logits (C, V) in their dtype; on a GPU also in fp32, on a CPU a few rows of them. In
    16 bits also the weight's copy when it trains, and the chunk's gradient of it, on a CPU a block of that in fp32,
    too; there fp16's products are made from fp32 copies of a block of their operands.
    """
    rows = min(loss_chunk_rows(shape.vocab_size, on_gpu), batch.tokens)
    chunk, head = rows * shape.vocab_size, shape.embedding_params if head_trains else 0
    hidden_bytes = FP32_BYTES if batch.fp16 else batch.compute_bytes
    gradients = hidden_bytes * batch.tokens * shape.hidden_size + FP32_BYTES * head
    if not batch.half:
        return gradients + FP32_BYTES * chunk * (2 if on_gpu else 1)
    beside = gradients + HALF_BYTES * (chunk + head)
    if on_gpu:
        return beside + max(FP32_BYTES * chunk, HALF_BYTES * head)
    softmax = FP32_BYTES * min(cpu_softmax_rows(shape.vocab_size), rows) * shape.vocab_size
    if batch.fp16:
        block = min(CPU_BLOCK_ROWS, shape.vocab_size)
        copies = block * rows + (block + rows) * shape.hidden_size
        return beside + softmax + FP32_BYTES * copies
    product = (HALF_BYTES + FP32_BYTES) * min(CPU_BLOCK_ROWS * shape.hidden_size, head)
    return beside + softmax + product


@dataclass(frozen=True)
class FsdpBuffers:
    """Bytes beyond shards and activations, at each moment of a step. All zero for DDP."""

    forward: int = 0
    loss: int = 0
    backward: int = 0
    end: int = 0  # of the backward pass, when embedding and head are reduced


def fsdp_buffers(inputs: PlanInputs) -> FsdpBuffers:
    """For one rank; weights are gathered in the dtype that they compute in, gradients are reduced in fp32.

    forward: a layer, the one before whose memory is not free yet, and the next, which is fetched meanwhile.
    backward: a layer and the next, its gradients, and those of the layer above as they are reduced.
    gloo, which CPU runs use, reduces a copy of its input.
    """
    if inputs.shards == 1:
        return FsdpBuffers()
    shape, trainable, unit = inputs.shape, inputs.resolved_trainable, inputs.frozen_bytes
    rest = shape.total_params - shape.num_hidden_layers * shape.layer_params
    layer_trains = shape.attention_params if trainable.attention_only else shape.layer_params
    rest_trains = rest if trainable.everything else 0
    reduced = FP32_BYTES * (1 if inputs.gpus else 2)
    return FsdpBuffers(
        forward=unit * (rest + 3 * shape.layer_params),
        loss=unit * (rest + shape.layer_params),
        backward=unit * (rest + rest_trains + 2 * shape.layer_params + layer_trains) + reduced * layer_trains,
        end=(unit + reduced) * rest_trains,
    )

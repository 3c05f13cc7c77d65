"""Peak memory of one process of a run, by part: weights, optimizer, activations, loss.

Pure functions of ``PlanInputs``; no torch. activations.py has the activations of one layer, capacity.py the available
memory. docs/memory.md derives the formulas and says what they were checked against.
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
    """Bytes on one GPU (or of one CPU process), by part; each part at its own maximum.

    The parts are not at their maximum at the same time, so ``peak_bytes`` is at most their sum.
    """

    weights: int  # frozen in bf16 on bf16 runs (fp16 on fp16 ones), trainable as fp32 masters
    weight_copies: int  # 16-bit ones of trainable matmul weights that autocast caches; FSDP2's gathered weights
    gradients: int  # fp32, of trainable parameters
    optimizer: int  # AdamW's state, and temporary tensors of its update
    activations: int  # what autograd saves from the forward to the backward pass
    working: int  # of one layer at a time: recomputed activations, gradients of activations
    logits: int  # one chunk of the loss, with the gradients that it computes
    peak_bytes: int
    peak_phase: str
    sharded: bool = False  # all parts except activations, working and logits are divided among ranks

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

    kept: int  # activations saved from forward to backward
    rerun: int  # saved again by the recomputation (0 without checkpointing)
    copies: int  # autocast's copies of its trainable weights
    gradients: int
    first_gradient: int  # down_proj's, the first to appear
    transient: int  # gradients of activations while its backward pass runs


def memory(inputs: PlanInputs) -> Memory:
    """Peak memory of one process.

    ddp: everything on every GPU; the reduction buckets are the gradients (gradient_as_bucket_view).
    fsdp: weights, gradients and optimizer state divided by the world size, and FSDP's own buffers.
    """
    trainable, shape, batch = inputs.resolved_trainable, inputs.shape, inputs.microbatch
    shards = inputs.shards
    params = trainable.params(shape)
    gradients = FP32_BYTES * params // shards
    weights = (inputs.frozen_bytes * (shape.total_params - params) + FP32_BYTES * params) // shards
    optimizer_state = optimizer_state_bytes(inputs, shards)
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
        optimizer=optimizer_state + _update_bytes(inputs, shards),
        activations=sum(layer.kept for layer in layers)
        + _held_bytes(inputs)
        + activations.final_norm_saved_bytes(shape, batch),
        working=max((layer.rerun + layer.transient for layer in layers), default=0),
        logits=loss_bytes(shape, batch, trainable.everything, bool(inputs.gpus)) + _final_hidden_bytes(shape, batch),
        peak_bytes=weights + optimizer_state + phases[phase],
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
    """Yield (phase of a step, bytes in addition to weights and optimizer state) for each phase that may be the peak.

    Gradients that outlive a backward pass exist from the start: DDP's buckets, or accumulated micro-batches. Otherwise
    they grow layer by layer from the last one, while activations are freed.
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
    # A tied embedding's gradient is dense. It is added to the head's gradient, which exists until then, and the sum
    # is added to the accumulated gradient, if there is one.
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
    """Bytes kept during the complete backward pass: cos, sin, and the boolean mask that checkpointed layers keep."""
    batch = inputs.microbatch
    mask = batch.mask_elements if inputs.gradient_checkpointing else 0
    return activations.rotary_bytes(inputs.shape, batch) + mask


def _final_hidden_bytes(shape: ModelShape, batch: Microbatch) -> int:
    return batch.compute_bytes * batch.tokens * shape.hidden_size


def optimizer_state_bytes(inputs: PlanInputs, shards: int = 1) -> int:
    """AdamW's state of all trainable parameters, on one of ``shards`` ranks."""
    tensors = inputs.resolved_trainable.tensors(inputs.shape)
    return sum(parameter_state_bytes(tensor, inputs.optimizer, shards) for tensor in tensors)


def _update_bytes(inputs: PlanInputs, shards: int) -> int:
    """Bytes that an optimizer update allocates: none when fused, otherwise temporaries of one tensor at a time."""
    if inputs.optimizer == "adamw_torch_fused":
        return 0
    each = 2 * FP32_BYTES
    if inputs.optimizer == EIGHT_BIT:
        each = COMPILED_UPDATE_BYTES if inputs.gpus else EAGER_UPDATE_BYTES
    return each * max(map(math.prod, inputs.resolved_trainable.tensors(inputs.shape)), default=0) // shards


def loss_bytes(shape: ModelShape, batch: Microbatch, head_trains: bool, on_gpu: bool = False) -> int:
    """Peak bytes of ``linear_cross_entropy_sum`` without its inputs, with chunks of C rows of V logits.

    The gradient of the hidden states (N, H) is in their dtype (fp16: in fp32), the gradient of a trainable weight
    (V, H) in fp32. A chunk's logits (C, V) are in the compute dtype, and also in fp32: all of them on a GPU, a few rows
    on a CPU. In 16 bits a trainable weight is copied, and each chunk has its own weight gradient; a CPU computes that
    in blocks, which are also converted to fp32. fp16 on a CPU computes products from fp32 copies of such blocks.
    """
    rows = min(loss_chunk_rows(shape.vocab_size, on_gpu), batch.tokens)
    chunk, head = rows * shape.vocab_size, shape.embedding_params if head_trains else 0
    hidden_bytes = FP32_BYTES if batch.fp16 else batch.compute_bytes
    gradients = hidden_bytes * batch.tokens * shape.hidden_size + FP32_BYTES * head
    if not batch.half:
        return gradients + FP32_BYTES * chunk * (2 if on_gpu else 1)
    total = gradients + HALF_BYTES * (chunk + head)
    if on_gpu:
        return total + max(FP32_BYTES * chunk, HALF_BYTES * head)
    softmax = FP32_BYTES * min(cpu_softmax_rows(shape.vocab_size), rows) * shape.vocab_size
    if batch.fp16:
        block = min(CPU_BLOCK_ROWS, shape.vocab_size)
        copies = block * rows + (block + rows) * shape.hidden_size
        return total + softmax + FP32_BYTES * copies
    product = (HALF_BYTES + FP32_BYTES) * min(CPU_BLOCK_ROWS * shape.hidden_size, head)
    return total + softmax + product


@dataclass(frozen=True)
class FsdpBuffers:
    """Bytes of gathered weights and unreduced gradients, by phase of a step. All zero for DDP."""

    forward: int = 0
    loss: int = 0
    backward: int = 0
    end: int = 0  # of the backward pass, when embedding and head are reduced


def fsdp_buffers(inputs: PlanInputs) -> FsdpBuffers:
    """FSDP's buffers on one rank. Weights are gathered in the compute dtype, gradients are reduced in fp32.

    forward: a layer, the previous one whose buffer is not yet free, and the next one, which is prefetched.
    backward: a layer and the next one to run, its gradients, and those of the layer above, which are being reduced.
    gloo, the backend on CPUs, reduces a copy of its input.
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

"""Activations of one micro-batch: the bytes that autograd saves, and those that are alive for a moment.

Pure functions of a model's shape and of what trains; no torch. memory.py makes the peak of a training step
of them. The derivations are written out in docs/memory.md; tests/plan/test_plan.py holds them to what torch saves.
"""

from dataclasses import dataclass

from flare.plan.model_shape import FP32_BYTES, HALF_BYTES, ModelShape
from flare.plan.trainable import Trainable


@dataclass(frozen=True)
class Microbatch:
    """What one forward and backward pass works on, and the number formats it works in.

    In bf16 runs matmuls run in bf16 under autocast; frozen weights are bf16 and trainable ones fp32. The
    residual stream has the dtype of the embedding: bf16 when that is frozen, fp32 when it trains. Sharded runs
    gather all weights in bf16 and need no autocast. fp16 runs are the same in fp16, but for the loss.
    """

    rows: int  # B
    seq_len: int  # T
    half: bool  # bf16 or fp16
    fp32_residual: bool
    document_mask: bool = True  # packed rows: SDPA gets a (B, 1, T, T) mask and k, v expanded to all heads
    eager_attention: bool = False
    fp16: bool = False  # half is fp16, whose products the loss makes in fp32

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def compute_bytes(self) -> int:
        return HALF_BYTES if self.half else FP32_BYTES

    @property
    def residual_bytes(self) -> int:
        return FP32_BYTES if self.fp32_residual or not self.half else HALF_BYTES

    @property
    def mask_elements(self) -> int:
        return self.rows * self.seq_len**2 if self.document_mask or self.eager_attention else 0


def norm_saved_bytes(elements: int, rows: int, input_bytes: int, needs_grad: bool = True) -> int:
    """What one RMSNorm saves (memory_efficient_layers.py): its input as it is, and 1/rms per row, in fp32."""
    return input_bytes * elements + FP32_BYTES * rows if needs_grad else 0


def attention_saved_bytes(shape: ModelShape, batch: Microbatch, trains: bool) -> int:
    """What the attention kernel saves: q, k, v, the output, fp32 logsumexp per head and query, the mask.

    The output is also o_proj's input: the same storage. A boolean mask is converted to the compute dtype,
    anew in every layer, and saved. Eager attention saves the probabilities instead, in fp32 as softmax
    made them and in the compute dtype; its output is saved only by an o_proj that trains.
    """
    expanded = batch.document_mask or batch.eager_attention
    key_value = shape.query_size if expanded else shape.key_value_size
    outputs = 1 if trains or not batch.eager_attention else 0
    saved = batch.compute_bytes * batch.tokens * ((1 + outputs) * shape.query_size + 2 * key_value)
    if batch.eager_attention:
        formats = FP32_BYTES + (HALF_BYTES if batch.half else 0)
        return saved + formats * shape.num_attention_heads * batch.mask_elements
    logsumexp = FP32_BYTES * batch.tokens * shape.num_attention_heads
    return saved + logsumexp + batch.compute_bytes * batch.mask_elements


def layer_saved_bytes(shape: ModelShape, batch: Microbatch, trainable: Trainable, layer_idx: int) -> int:
    """Activations that autograd saves for one decoder layer (bytes); 0 below the lowest trainable layer.

    Weights, and autocast's bf16 copies of them, are not in it. A checkpointed layer saves the same when its
    forward pass runs again.
    """
    first = trainable.first_backward(shape)
    if layer_idx < first:
        return 0
    n, compute = batch.tokens, batch.compute_bytes
    hidden, inner = n * shape.hidden_size, n * shape.intermediate_size
    attention, mlp = trainable.attention(layer_idx), trainable.mlp(layer_idx)
    # The input of the lowest trainable layer needs no gradient, unless the embedding below it trains.
    input_has_grad = trainable.everything or layer_idx > first
    saved = norm_saved_bytes(hidden, n, batch.residual_bytes, input_has_grad or mlp)
    saved += norm_saved_bytes(hidden, n, batch.residual_bytes)
    if shape.family == "qwen3":  # q_norm and k_norm, over each head
        for heads in (shape.num_attention_heads, shape.num_key_value_heads):
            saved += norm_saved_bytes(n * heads * shape.head_dim, n * heads, compute)
    saved += attention_saved_bytes(shape, batch, attention)
    saved += 2 * compute * inner  # gate_proj's output and up_proj's
    saved += attention * compute * hidden  # one input for q, k and v
    saved += mlp * compute * (hidden + inner)  # one for gate and up; down_proj's
    return saved


def layer_input_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """All that a checkpointed layer keeps, unless selectively: its input."""
    return batch.residual_bytes * batch.tokens * shape.hidden_size


def selective_saved_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """What a selectively checkpointed layer keeps beside its input: what matrix products and attention gave.

    q, k, v, o, gate and up; not down_proj, whose output nothing in the layer reads. The kernel's output and its fp32
    logsumexp; eager attention keeps nothing.
    """
    widths = shape.query_size + 2 * shape.key_value_size + shape.hidden_size + 2 * shape.intermediate_size
    if batch.eager_attention:
        return batch.compute_bytes * batch.tokens * widths
    logsumexp = FP32_BYTES * batch.tokens * shape.num_attention_heads
    return batch.compute_bytes * batch.tokens * (widths + shape.query_size) + logsumexp


def rotary_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """cos and sin, once for all layers."""
    return 2 * batch.residual_bytes * batch.tokens * shape.head_dim


def final_norm_saved_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """What the norm above the last layer saves."""
    hidden = batch.tokens * shape.hidden_size
    return norm_saved_bytes(hidden, batch.tokens, batch.residual_bytes)


def forward_transient_bytes(shape: ModelShape, batch: Microbatch, checkpointed: bool) -> int:
    """Alive for a moment at the end of a forward pass besides what is saved: the boolean mask, and two fp32 tensors in
    the final norm. Or, where the last layer is checkpointed, input and output of its MLP and down_proj's input."""
    hidden, inner = batch.tokens * shape.hidden_size, batch.tokens * shape.intermediate_size
    mlp = batch.compute_bytes * (inner + 2 * hidden) if checkpointed else 0
    return batch.mask_elements + max(2 * FP32_BYTES * hidden, mlp)


def backward_transient_bytes(shape: ModelShape, batch: Microbatch, mlp_trains: bool) -> int:
    """Gradients of activations at the fullest moment of a layer's backward pass, less what is freed by then.

    That moment is the backward pass of the MLP's product: its own gradient and those of its two factors,
    N x I each, while down_proj's saved input (saved only if it trains) is gone; and the residual stream's
    gradient. With few tokens it is the one before: down_proj's weight gradient, as the matmul makes it and
    in fp32. Eager attention: the gradient of the probabilities, in the compute dtype and in fp32, when what
    the MLP saved is gone.
    """
    inner = batch.compute_bytes * batch.tokens * shape.intermediate_size
    moments = [(2 if mlp_trains else 3) * inner]
    if mlp_trains:
        formats = FP32_BYTES + (HALF_BYTES if batch.half else 0)
        moments.append(formats * shape.hidden_size * shape.intermediate_size)
    if batch.eager_attention:
        scores = (batch.compute_bytes + FP32_BYTES) * shape.num_attention_heads * batch.mask_elements
        moments.append(scores - (3 if mlp_trains else 2) * inner)
    return max(moments) + batch.residual_bytes * batch.tokens * shape.hidden_size

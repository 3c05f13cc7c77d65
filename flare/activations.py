"""Activations of one micro-batch: the bytes that autograd saves, and those that are alive for a moment.

Pure functions of a model's shape and of what trains; no torch. memory.py makes the peak of a training step
of them. The derivations are written out in docs/memory.md; tests/test_plan.py holds them to what torch saves.
"""

from dataclasses import dataclass

from flare.shapes import FP32_BYTES, HALF_BYTES, ModelShape
from flare.trainable import Trainable


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
    autocast: bool = True  # of a bf16 or fp16 run
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


def norm_saved_bytes(elements: int, rows: int, input_bytes: int, trains: bool, input_has_grad: bool) -> int:
    """What one RMSNorm saves: the input in fp32 and 1/rms per row; for its weight, the normalised input.

    An fp32 input is saved as it is, a bf16 one as an fp32 copy: 4 bytes an element either way.
    """
    for_input = FP32_BYTES * (elements + rows) if input_has_grad else 0
    return for_input + (input_bytes * elements if trains else 0)


def linear_inputs_saved_bytes(elements: int, input_bytes: int, compute_bytes: int, consumers: int) -> int:
    """Input that ``consumers`` trainable projections save for their weight gradients.

    One tensor serves them all, unless autocast has to convert it: its cache holds weights only, so every
    projection converts, and saves, its own copy.
    """
    copies = consumers if input_bytes != compute_bytes else 1
    return copies * compute_bytes * elements


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
    # A trainable norm multiplies by its fp32 weight, which makes the output fp32.
    normed_bytes = FP32_BYTES if mlp and batch.autocast else max(batch.residual_bytes, compute)
    saved = norm_saved_bytes(hidden, n, batch.residual_bytes, mlp, input_has_grad)
    saved += norm_saved_bytes(hidden, n, batch.residual_bytes, mlp, True)
    if attention:
        saved += linear_inputs_saved_bytes(hidden, normed_bytes, compute, consumers=3)
    if shape.family == "qwen3":  # q_norm and k_norm, over each head
        for heads in (shape.num_attention_heads, shape.num_key_value_heads):
            saved += norm_saved_bytes(n * heads * shape.head_dim, n * heads, compute, attention, True)
    saved += attention_saved_bytes(shape, batch, attention)
    saved += 3 * compute * inner  # gate_proj's output, silu of it, up_proj's output
    if mlp:
        saved += linear_inputs_saved_bytes(hidden, normed_bytes, compute, consumers=2)
        saved += compute * inner  # down_proj's input
    return saved


def layer_input_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """All that a checkpointed layer keeps, unless selectively: its input."""
    return batch.residual_bytes * batch.tokens * shape.hidden_size


def products_bytes(shape: ModelShape, batch: Microbatch) -> int:
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


def final_norm_saved_bytes(shape: ModelShape, batch: Microbatch, trainable: Trainable) -> int:
    """What the norm above the last layer saves."""
    hidden = batch.tokens * shape.hidden_size
    return norm_saved_bytes(hidden, batch.tokens, batch.residual_bytes, trainable.everything, True)


def forward_transient_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """Alive for a moment in a forward pass besides what is saved: the boolean mask, an fp32 norm."""
    return batch.mask_elements + FP32_BYTES * batch.tokens * shape.hidden_size


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
        moments.append(scores - (4 if mlp_trains else 3) * inner)
    return max(moments) + batch.residual_bytes * batch.tokens * shape.hidden_size

"""Bytes of the activations of one micro-batch: those that autograd saves, and temporary ones.

Pure functions of a model's shape and its trainable parameters; no torch. memory.py computes the peak of a training
step from them. docs/memory.md derives the formulas; tests/plan/test_saved_activations.py compares them with torch.
"""

from dataclasses import dataclass

from flare.plan.model_shape import FP32_BYTES, HALF_BYTES, ModelShape
from flare.plan.trainable import Trainable


@dataclass(frozen=True)
class Microbatch:
    """The size and the dtypes of one forward and backward pass.

    In bf16 runs, matmuls run in bf16 under autocast. Frozen weights are bf16, trainable weights fp32. The residual
    stream has the dtype of the embedding: bf16 when it is frozen, fp32 when it trains. Sharded runs gather all weights
    in bf16 and need no autocast. fp16 runs are the same in fp16, except for the loss.
    """

    rows: int  # B
    seq_len: int  # T
    half: bool  # bf16 or fp16
    fp32_residual: bool
    document_mask: bool = True  # SDPA of packed rows: a (B, 1, T, T) mask, k and v expanded to all heads
    eager_attention: bool = False
    fp16: bool = False  # half is fp16; the loss then computes products in fp32

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
    """Bytes that one RMSNorm saves (memory_efficient_layers.py): its input in its dtype, and 1/rms per row in fp32."""
    return input_bytes * elements + FP32_BYTES * rows if needs_grad else 0


def attention_saved_bytes(shape: ModelShape, batch: Microbatch, trains: bool) -> int:
    """Bytes that the attention kernel saves: q, k, v, the output, fp32 logsumexp per head and query, the mask.

    The output and o_proj's input share their storage. Every layer converts the boolean mask to the compute dtype and
    saves the result. Eager attention instead saves the probabilities, in the fp32 of softmax and in the compute dtype;
    its output is saved only by a trainable o_proj.
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

    Weights and autocast's bf16 copies of them are not included. A checkpointed layer saves the same bytes when its
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
    """Bytes of a layer's input: all that full activation checkpointing keeps of the layer."""
    return batch.residual_bytes * batch.tokens * shape.hidden_size


def selective_saved_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """Bytes that selective checkpointing keeps of a layer in addition to its input.

    These are the outputs of q, k, v, o, gate and up, and the attention kernel's output and fp32 logsumexp. The output
    of down_proj is not kept, because nothing in the layer reads it. Eager attention keeps only the projections.
    """
    widths = shape.query_size + 2 * shape.key_value_size + shape.hidden_size + 2 * shape.intermediate_size
    if batch.eager_attention:
        return batch.compute_bytes * batch.tokens * widths
    logsumexp = FP32_BYTES * batch.tokens * shape.num_attention_heads
    return batch.compute_bytes * batch.tokens * (widths + shape.query_size) + logsumexp


def rotary_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """Bytes of cos and sin, which all layers share."""
    return 2 * batch.residual_bytes * batch.tokens * shape.head_dim


def final_norm_saved_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """Bytes that the norm after the last layer saves."""
    hidden = batch.tokens * shape.hidden_size
    return norm_saved_bytes(hidden, batch.tokens, batch.residual_bytes)


def forward_transient_bytes(shape: ModelShape, batch: Microbatch, checkpointed: bool) -> int:
    """Temporary bytes at the end of a forward pass: the boolean mask, and two fp32 tensors in the final norm.

    If the last layer is checkpointed, input and output of its MLP and down_proj's input can be larger than the norm's
    tensors.
    """
    hidden, inner = batch.tokens * shape.hidden_size, batch.tokens * shape.intermediate_size
    mlp = batch.compute_bytes * (inner + 2 * hidden) if checkpointed else 0
    return batch.mask_elements + max(2 * FP32_BYTES * hidden, mlp)


def backward_transient_bytes(shape: ModelShape, batch: Microbatch, mlp_trains: bool) -> int:
    """Peak bytes of the gradients of activations in a layer's backward pass, less the activations freed by then.

    Usually the peak is in the MLP's element-wise product: its gradient and those of its two factors, (N, I) each, and
    the gradient of the residual stream. down_proj's input, which is saved only if down_proj trains, is freed by then.
    With few tokens the peak is one step earlier: down_proj's weight gradient, as the matmul returns it and in fp32.
    With eager attention it can be the gradient of the probabilities, in the compute dtype and in fp32; the MLP's saved
    tensors are freed by then.
    """
    inner = batch.compute_bytes * batch.tokens * shape.intermediate_size
    candidates = [(2 if mlp_trains else 3) * inner]
    if mlp_trains:
        formats = FP32_BYTES + (HALF_BYTES if batch.half else 0)
        candidates.append(formats * shape.hidden_size * shape.intermediate_size)
    if batch.eager_attention:
        scores = (batch.compute_bytes + FP32_BYTES) * shape.num_attention_heads * batch.mask_elements
        candidates.append(scores - (3 if mlp_trains else 2) * inner)
    return max(candidates) + batch.residual_bytes * batch.tokens * shape.hidden_size

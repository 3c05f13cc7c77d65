"""FLOPs to train one token, by part: pure functions of a model's shape and its trainable parameters. No torch."""

from dataclasses import dataclass

from flare.config.options import SELECTIVE
from flare.plan.model_shape import ModelShape
from flare.plan.trainable import Trainable


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs to train one token, by part. A multiply-add counts as two.

    ``model`` is what papers call model FLOPs: 6N plus three times causal attention, as if all parameters trained and
    nothing were recomputed.
    """

    frozen_prefix: int  # layers below the lowest trainable one: 2N, forward only
    frozen_above: int  # frozen matrices, including a frozen head, that pass a gradient on: 4N
    trainable: int  # 6N: forward, gradient of the input, gradient of the weight
    attention: int  # scores and weighted sums, forward and backward
    recompute: int  # gradient checkpointing
    model: int

    @property
    def executed(self) -> int:
        return self.frozen_prefix + self.frozen_above + self.trainable + self.attention + self.recompute


def attention_forward_flops(shape: ModelShape, seq_len: int) -> int:
    """FLOPs of one layer's attention per token, without the projections.

    A query meets (T + 1) / 2 ~ T / 2 keys on average over a causal row of T tokens. For each key and head,
    the score q . k and the weighted sum of v are D multiply-adds each: 4 D FLOPs. Over the heads:
    4 x T / 2 x heads x head_dim = 2 T x query_size. Sharing key-value heads saves memory, not FLOPs. Several
    documents in a row shorten the context, but a kernel that takes a mask computes all T keys.
    """
    return 2 * seq_len * shape.query_size


def token_flops(
    shape: ModelShape,
    trainable: Trainable,
    seq_len: int,
    gradient_checkpointing: bool | str = False,
    eager_attention: bool = False,
) -> TokenFlops:
    """FLOPs per token of a training step, from the rule 2N / 4N / 6N per matrix of N weights.

    Matmul weights only: the embedding is a lookup, norms and biases are below a percent. The head is a
    matmul whether tied or not. With attention only, the lowest q, k and v need no input gradient (4N
    instead of 6N): below a percent, left out. Attention's backward is 2.5 times its forward: five matmuls
    instead of two, since flash kernels compute the scores again. Source: Dao, FlashAttention-2 (2023),
    section 4.1.
    """
    first, head = trainable.first_backward(shape), shape.embedding_params
    backward_layers = shape.num_hidden_layers - first
    weights = sum(trainable.matmul_params(shape, i) for i in range(shape.num_hidden_layers))
    frozen_above = backward_layers * shape.layer_matmul_params - weights
    if trainable.everything:
        weights += head
    else:
        frozen_above += head
    attention = attention_forward_flops(shape, seq_len)
    # The recomputed forward pass stops before down_proj, because nothing saves its output.
    rerun = 2 * (shape.layer_matmul_params - shape.hidden_size * shape.intermediate_size) + attention
    if gradient_checkpointing == SELECTIVE:  # keeps all matmul outputs except those of eager attention
        rerun = attention if eager_attention else 0
    recompute = backward_layers * rerun if gradient_checkpointing else 0
    all_matmul = shape.num_hidden_layers * shape.layer_matmul_params + head
    return TokenFlops(
        frozen_prefix=2 * first * shape.layer_matmul_params,
        frozen_above=4 * frozen_above,
        trainable=6 * weights,
        attention=shape.num_hidden_layers * attention + backward_layers * attention * 5 // 2,
        recompute=recompute,
        model=6 * all_matmul + 3 * shape.num_hidden_layers * attention,
    )

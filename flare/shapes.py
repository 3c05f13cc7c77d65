"""Arithmetic of Qwen2 and Qwen3 decoders: parameters, FLOPs, and bytes that autograd saves.

Pure functions of a config.json; standard library only. What fits on a card is settled in plan.py. The
derivations are written out in docs/memory.md; tests/test_plan.py holds them to transformers' own models.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from flare.errors import ConfigError, nearest
from flare.nope.format import family_of

FP32_BYTES, BF16_BYTES = 4, 2

REQUIRED_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense Qwen decoder, spelled as in config.json; counts of parameters, not bytes."""

    family: Literal["qwen2", "qwen3"]
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    attention_bias: bool = False  # Qwen3 only; Qwen2 always has biases on q, k and v
    name: str = ""

    @classmethod
    def from_config(cls, config: dict, name: str = "config.json") -> "ModelShape":
        """The shape that a config.json describes, with transformers' defaults for absent keys.

        Raises: ConfigError for another model_type, or a missing or impossible size.
        """
        family = family_of(config, name)
        missing = [key for key in REQUIRED_KEYS if not isinstance(config.get(key), int) or config[key] < 1]
        if missing:
            raise ConfigError(f"{name}: {', '.join(missing)} must be a whole number above 0")
        heads = config["num_attention_heads"]
        # Qwen3Config's own default is 128, whatever the hidden size; Qwen2 divides.
        default_dim = 128 if family == "qwen3" else config["hidden_size"] // heads
        return cls(
            family=family,
            num_hidden_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_dim,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            name=name,
        )

    def to_config(self) -> dict:
        """A config.json that says what this shape says: enough to plan, not to load a model."""
        sizes = {field: value for field, value in vars(self).items() if field not in ("family", "name")}
        return {"model_type": self.family, **sizes}

    @property
    def query_size(self) -> int:
        """Width of q and of the attention output: heads x head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of k, and of v."""
        return self.num_key_value_heads * self.head_dim

    @property
    def embedding_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def lm_head_params(self) -> int:
        """Parameters of its own: none when tied to the embedding."""
        return 0 if self.tie_word_embeddings else self.embedding_params

    @property
    def attention_matmul_params(self) -> int:
        """Weights of one layer's q, k, v and o projections."""
        return self.hidden_size * (2 * self.query_size + 2 * self.key_value_size)

    @property
    def attention_params(self) -> int:
        """One layer's self_attn: projections, biases (Qwen2: q, k, v), Qwen3's q_norm and k_norm."""
        qkv_bias = self.query_size + 2 * self.key_value_size
        if self.family == "qwen2":
            return self.attention_matmul_params + qkv_bias
        biases = qkv_bias + self.hidden_size if self.attention_bias else 0
        return self.attention_matmul_params + biases + 2 * self.head_dim

    @property
    def mlp_params(self) -> int:
        """One layer's gate, up and down projections."""
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def norm_params(self) -> int:
        """One layer's two RMSNorms over the hidden size."""
        return 2 * self.hidden_size

    @property
    def layer_params(self) -> int:
        return self.attention_params + self.mlp_params + self.norm_params

    @property
    def layer_matmul_params(self) -> int:
        return self.attention_matmul_params + self.mlp_params

    @property
    def final_norm_params(self) -> int:
        return self.hidden_size

    @property
    def total_params(self) -> int:
        layers = self.num_hidden_layers * self.layer_params
        return self.embedding_params + layers + self.final_norm_params + self.lm_head_params


def _known(rows: str) -> dict[str, ModelShape]:
    """The table of shared/FIELD.md: one model a line, in the order of ModelShape's fields."""
    shapes = {}
    for row in rows.split("\n"):
        name, *sizes, tied = row.split()
        family = "qwen3" if name.startswith("Qwen3") else "qwen2"
        hub_name = f"Qwen/{name}"
        shapes[hub_name] = ModelShape(family, *map(int, sizes), tied == "tied", name=hub_name)
    return shapes


# name, layers, hidden, heads, key-value heads, head_dim, MLP, vocabulary. Source: the models' config.json.
KNOWN_SHAPES = _known("""\
Qwen2.5-0.5B 24  896 14 2  64  4864 151936 tied
Qwen2.5-1.5B 28 1536 12 2 128  8960 151936 tied
Qwen2.5-3B   36 2048 16 2 128 11008 151936 tied
Qwen2.5-7B   28 3584 28 4 128 18944 152064 untied
Qwen2.5-14B  48 5120 40 8 128 13824 152064 untied
Qwen2.5-32B  64 5120 40 8 128 27648 152064 untied
Qwen3-0.6B   28 1024 16 8 128  3072 151936 tied
Qwen3-1.7B   28 2048 16 8 128  6144 151936 tied
Qwen3-4B     36 2560 32 8 128  9728 151936 tied
Qwen3-8B     36 4096 32 8 128 12288 151936 untied
Qwen3-14B    40 5120 40 8 128 17408 151936 untied
Qwen3-32B    64 5120 64 8 128 25600 151936 untied""")


def known_shape(name: str) -> ModelShape:
    """The shape of a model by its hub name; ``-Base`` and ``-Instruct`` have that of the plain name.

    Raises: ConfigError when the table does not have it.
    """
    plain = name.removesuffix("-Base").removesuffix("-Instruct")
    if plain not in KNOWN_SHAPES:
        hint = nearest(plain, KNOWN_SHAPES)
        raise ConfigError(f"the shape of {name!r} is not known without its config.json{hint}")
    return replace(KNOWN_SHAPES[plain], name=name)


# --- what trains ---


@dataclass(frozen=True)
class Trained:
    """Which parameters train: everything, or some layers, or only the attention of these layers."""

    everything: bool
    layers: frozenset[int] = frozenset()
    attention_only: bool = False

    @classmethod
    def of(cls, layers: Collection[int] | Literal["all"], attention_only: bool = False) -> "Trained":
        """``"all"`` is everything: layers, norms, embedding and head."""
        return cls(True) if layers == "all" else cls(False, frozenset(layers), attention_only)

    def attention(self, layer_idx: int) -> bool:
        """Whether this layer's self_attn trains."""
        return self.everything or layer_idx in self.layers

    def mlp(self, layer_idx: int) -> bool:
        """Whether this layer's MLP and its two norms train."""
        return self.attention(layer_idx) and not self.attention_only

    def first_backward(self, shape: ModelShape) -> int:
        """The lowest layer with a backward pass: autograd records nothing below the lowest trainable one."""
        if self.everything:
            return 0
        return min(self.layers, default=shape.num_hidden_layers)

    def params(self, shape: ModelShape) -> int:
        """Number of trainable parameters; a tied weight counts once."""
        if self.everything:
            return shape.total_params
        return len(self.layers) * (shape.attention_params if self.attention_only else shape.layer_params)

    def matmul_params(self, shape: ModelShape, layer_idx: int) -> int:
        """Trainable matmul weights of one layer."""
        attention = self.attention(layer_idx) * shape.attention_matmul_params
        return attention + self.mlp(layer_idx) * shape.mlp_params


# --- FLOPs ---


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs to train one token, by part. A multiply-add is two.

    ``model`` is what papers call model FLOPs: 6N plus three times causal attention, as if everything
    trained and nothing ran twice.
    """

    frozen_prefix: int  # layers below the lowest trainable one: 2N, forward only
    frozen_above: int  # frozen matrices (a frozen head, too) that pass a gradient down: 4N
    trainable: int  # 6N: forward, gradient of the input, gradient of the weight
    attention: int  # scores and weighted sums, forward and backward
    recompute: int  # gradient checkpointing, and the chunked loss where it computes its logits twice
    model: int

    @property
    def executed(self) -> int:
        return self.frozen_prefix + self.frozen_above + self.trainable + self.attention + self.recompute


def attention_forward_flops(shape: ModelShape, seq_len: int) -> int:
    """FLOPs of one layer's attention per token, projections apart.

    A query meets (T + 1) / 2 ~ T / 2 keys on average over a causal row of T tokens. For each key and head,
    the score q . k and the weighted sum of v are D multiply-adds each: 4 D FLOPs. Over the heads:
    4 x T / 2 x heads x head_dim = 2 T x query_size. Key-value sharing saves memory, not FLOPs. Documents
    that restart inside a row would shorten the context; a kernel that takes a mask computes all T keys.
    """
    return 2 * seq_len * shape.query_size


def token_flops(
    shape: ModelShape,
    trained: Trained,
    seq_len: int,
    gradient_checkpointing: bool = False,
    loss_recompute: bool = False,
) -> TokenFlops:
    """FLOPs per token of a training step, from the rule 2N / 4N / 6N per matrix of N weights.

    Matmul weights only: the embedding is a lookup, norms and biases are below a percent. The head is a
    matmul whether tied or not. With attention only, the lowest q, k and v need no input gradient (4N
    instead of 6N): below a percent, left out. Attention's backward is 2.5 times its forward: five matmuls
    instead of two, since flash kernels compute the scores again. Source: Dao, FlashAttention-2 (2023),
    section 4.1.
    ``loss_recompute``: the chunked loss computes its logits again in the backward pass (see loss_bytes).
    """
    first, head = trained.first_backward(shape), shape.embedding_params
    backward_layers = shape.num_hidden_layers - first
    trainable = sum(trained.matmul_params(shape, i) for i in range(shape.num_hidden_layers))
    frozen_above = backward_layers * shape.layer_matmul_params - trainable
    if trained.everything:
        trainable += head
    else:
        frozen_above += head
    attention = attention_forward_flops(shape, seq_len)
    # A checkpoint's second forward pass stops before down_proj: nothing saves its output.
    rerun = 2 * (shape.layer_matmul_params - shape.hidden_size * shape.intermediate_size) + attention
    recompute = backward_layers * rerun if gradient_checkpointing else 0
    all_matmul = shape.num_hidden_layers * shape.layer_matmul_params + head
    return TokenFlops(
        frozen_prefix=2 * first * shape.layer_matmul_params,
        frozen_above=4 * frozen_above,
        trainable=6 * trainable,
        attention=shape.num_hidden_layers * attention + backward_layers * attention * 5 // 2,
        recompute=recompute + (2 * head if loss_recompute else 0),
        model=6 * all_matmul + 3 * shape.num_hidden_layers * attention,
    )


# --- bytes that autograd saves ---


@dataclass(frozen=True)
class Microbatch:
    """What one forward and backward pass works on, and the number formats it works in.

    In bf16 runs matmuls run in bf16 under autocast; frozen weights are bf16 and trainable ones fp32. The
    residual stream has the dtype of the embedding: bf16 when that is frozen, fp32 when it trains.
    """

    rows: int  # B
    seq_len: int  # T
    bf16: bool
    fp32_residual: bool
    document_mask: bool = True  # packed rows: SDPA gets a (B, 1, T, T) mask and k, v expanded to all heads
    eager_attention: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    @property
    def compute_bytes(self) -> int:
        return BF16_BYTES if self.bf16 else FP32_BYTES

    @property
    def residual_bytes(self) -> int:
        return FP32_BYTES if self.fp32_residual or not self.bf16 else BF16_BYTES

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
        formats = FP32_BYTES + (BF16_BYTES if batch.bf16 else 0)
        return saved + formats * shape.num_attention_heads * batch.mask_elements
    logsumexp = FP32_BYTES * batch.tokens * shape.num_attention_heads
    return saved + logsumexp + batch.compute_bytes * batch.mask_elements


def layer_saved_bytes(shape: ModelShape, batch: Microbatch, trained: Trained, layer_idx: int) -> int:
    """Activations that autograd saves for one decoder layer (bytes); 0 below the lowest trainable layer.

    Weights, and autocast's bf16 copies of them, are not in it. A checkpointed layer saves the same when its
    forward pass runs again.
    """
    first = trained.first_backward(shape)
    if layer_idx < first:
        return 0
    n, compute = batch.tokens, batch.compute_bytes
    hidden, inner = n * shape.hidden_size, n * shape.intermediate_size
    attention, mlp = trained.attention(layer_idx), trained.mlp(layer_idx)
    # The input of the lowest trainable layer needs no gradient, unless the embedding below it trains.
    input_has_grad = trained.everything or layer_idx > first
    # A trainable norm multiplies by its fp32 weight, which makes the output fp32.
    normed_bytes = FP32_BYTES if mlp else max(batch.residual_bytes, compute)
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
    """All that a checkpointed layer keeps: its input."""
    return batch.residual_bytes * batch.tokens * shape.hidden_size


def rotary_bytes(shape: ModelShape, batch: Microbatch) -> int:
    """cos and sin, once for all layers."""
    return 2 * batch.residual_bytes * batch.tokens * shape.head_dim


def final_norm_saved_bytes(shape: ModelShape, batch: Microbatch, trained: Trained) -> int:
    """What the norm above the last layer saves."""
    hidden = batch.tokens * shape.hidden_size
    return norm_saved_bytes(hidden, batch.tokens, batch.residual_bytes, trained.everything, True)


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
        formats = FP32_BYTES + (BF16_BYTES if batch.bf16 else 0)
        moments.append(formats * shape.hidden_size * shape.intermediate_size)
    if batch.eager_attention:
        scores = (batch.compute_bytes + FP32_BYTES) * shape.num_attention_heads * batch.mask_elements
        moments.append(scores - (4 if mlp_trains else 3) * inner)
    return max(moments) + batch.residual_bytes * batch.tokens * shape.hidden_size

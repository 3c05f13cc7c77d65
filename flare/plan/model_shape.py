"""Sizes of Qwen2 and Qwen3 decoders and their counts of parameters, from a config.json or a known name.

Standard library only. flops.py has the FLOPs of a token, activations.py the bytes that autograd saves.
tests/plan/test_model_shape.py compares the counts with transformers' models.
"""

from dataclasses import dataclass, replace
from typing import Literal

from flare.errors import ConfigError, nearest
from flare.nope.config_json import family_of

FP32_BYTES, HALF_BYTES = 4, 2

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
        """The shape as a config.json: enough to plan, not enough to load a model."""
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
        """Parameters of the head; 0 when it is tied to the embedding."""
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
    """Parse a table with one model a line, columns in the order of ModelShape's fields."""
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
    """The shape of a model by its hub name; ``-Base`` and ``-Instruct`` have the shape of the name without it.

    Raises: ConfigError when the table does not have it.
    """
    plain = name.removesuffix("-Base").removesuffix("-Instruct")
    if plain not in KNOWN_SHAPES:
        hint = nearest(plain, KNOWN_SHAPES)
        raise ConfigError(f"the shape of {name!r} is not known without its config.json{hint}")
    return replace(KNOWN_SHAPES[plain], name=name)

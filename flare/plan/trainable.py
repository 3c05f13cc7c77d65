"""The trainable part of a model in a stage: everything, some layers, or the attention of some layers. No torch.

The model freezes the rest accordingly, and the plan counts with it.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from flare.errors import ConfigError
from flare.nope.layers import format_layers, parse_layers
from flare.plan.model_shape import ModelShape


@dataclass(frozen=True)
class Trainable:
    """The trainable part: everything, or some layers (only their attention when ``attention_only``)."""

    everything: bool
    layers: tuple[int, ...] = ()
    attention_only: bool = False

    @classmethod
    def of(cls, layers: Collection[int] | Literal["all"], attention_only: bool = False) -> "Trainable":
        """These layers; ``"all"`` is everything: layers, norms, embedding and head."""
        return cls(True) if layers == "all" else cls(False, tuple(sorted(set(layers))), attention_only)

    @classmethod
    def parse(cls, words: list[str] | None, stage: int, nope_layers: list[int], depth: int) -> "Trainable":
        """Parse ``--train_layers`` for a model with ``depth`` layers.

        Raises: ConfigError when nothing would be trained.
        """
        words = words or (["nope"] if stage == 1 else ["all"])
        if words == ["all"]:
            return cls.of("all")
        if words in (["nope"], ["nope_attention"]):
            if not nope_layers:
                raise ConfigError(
                    f"stage {stage}: nothing to train, --no_rope_layers none leaves no NoPE layer; name layers "
                    "with --train_layers (the RoPE control run: --train_layers 20-32)"
                )
            return cls.of(nope_layers, words == ["nope_attention"])
        layers = parse_layers(words, depth, "--train_layers")
        if not layers:
            raise ConfigError(
                f"stage {stage}: nothing to train, --train_layers {' '.join(words)}; name layers, or all"
            )
        return cls.of(layers)

    def __str__(self) -> str:
        if self.everything:
            return "all layers, embedding and head"
        return f"{'attention of ' if self.attention_only else ''}layers {format_layers(list(self.layers))}"

    def covers(self, name: str) -> bool:
        """Whether the parameter of this name trains."""
        if self.everything:
            return True
        parts = name.split(".")
        if "layers" not in parts or int(parts[parts.index("layers") + 1]) not in self.layers:
            return False
        return not self.attention_only or "self_attn" in parts

    def attention(self, layer_idx: int) -> bool:
        """Whether this layer's self_attn trains."""
        return self.everything or layer_idx in self.layers

    def mlp(self, layer_idx: int) -> bool:
        """Whether this layer's MLP and its two norms train."""
        return self.attention(layer_idx) and not self.attention_only

    def first_backward(self, shape: ModelShape) -> int:
        """The lowest layer with a backward pass. Autograd records nothing below the lowest trainable layer."""
        if self.everything:
            return 0
        return min(self.layers, default=shape.num_hidden_layers)

    def params(self, shape: ModelShape) -> int:
        """Number of trainable parameters; a tied weight counts once."""
        if self.everything:
            return shape.total_params
        return len(self.layers) * (shape.attention_params if self.attention_only else shape.layer_params)

    def tensors(self, shape: ModelShape) -> Iterator[tuple[int, ...]]:
        """The shape of each trainable matrix. The vectors of a layer count as one, and so do those outside of layers."""
        hidden, inner, query, key_value = (
            shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_value_size,
        )  # fmt: skip
        attention = [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]
        mlp = [] if self.attention_only else [(inner, hidden), (inner, hidden), (hidden, inner)]
        vectors = shape.attention_params - shape.attention_matmul_params
        vectors += 0 if self.attention_only else shape.norm_params
        for _ in range(shape.num_hidden_layers) if self.everything else self.layers:
            yield from [*attention, *mlp, (vectors,)]
        if self.everything:
            heads = 1 if shape.tie_word_embeddings else 2
            yield from [(shape.vocab_size, hidden)] * heads + [(shape.final_norm_params,)]

    def matmul_params(self, shape: ModelShape, layer_idx: int) -> int:
        """Trainable matmul weights of one layer."""
        attention = self.attention(layer_idx) * shape.attention_matmul_params
        return attention + self.mlp(layer_idx) * shape.mlp_params

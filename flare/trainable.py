"""What trains in a stage: everything, or some layers, or the attention of some layers. No torch."""

from dataclasses import dataclass

from flare.errors import ConfigError
from flare.nope.layers import format_layers, parse_layers


@dataclass(frozen=True)
class Trainable:
    """What trains: everything, or some layers (their attention only when ``attention_only``)."""

    everything: bool
    layers: tuple[int, ...] = ()
    attention_only: bool = False

    @classmethod
    def parse(cls, words: list[str] | None, stage: int, nope_layers: list[int], depth: int) -> "Trainable":
        """``--train_layers`` for a model of this depth.

        Raises: ConfigError when nothing would train.
        """
        words = words or (["nope"] if stage == 1 else ["all"])
        if words == ["all"]:
            return cls(everything=True)
        if words in (["nope"], ["nope_attention"]):
            if not nope_layers:
                raise ConfigError(
                    f"stage {stage}: nothing to train, --no_rope_layers none leaves no NoPE layer; name layers "
                    "with --train_layers (the RoPE control run: --train_layers 20-32)"
                )
            return cls(False, tuple(nope_layers), words == ["nope_attention"])
        return cls(False, tuple(parse_layers(words, depth, "--train_layers")))

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

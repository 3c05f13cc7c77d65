"""nope_canary.json: log-probabilities of fixed tokens under a NoPE model and under the same weights with RoPE.

The file shows which of the two models runs, from log-probabilities alone. Perplexity cannot show it (a NoPE model
opened with RoPE may even score better), single tokens can. No torch here: measure.py measures a model, endpoint.py
queries a server.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from flare.errors import CheckpointError
from flare.nope.layers import format_layers

CANARY_FILE = "nope_canary.json"
FORMAT_VERSION = 1
TOP_K = 5

TRUE_MODEL = "true model"
ROPE_EVERYWHERE = "RoPE everywhere"
NEITHER = "neither"
UNDECIDABLE = "undecidable"

HOW_TO_FIX = f"put the true config.json back, or remove {CANARY_FILE} if the model was changed on purpose"

FP32_NOISE_NATS = 1e-3
"""References that are closer to each other than this cannot be distinguished. A cautious guess for
large models on other machines; on tiny ones another attention kernel changed the mean by 1e-6 nats."""


@dataclass(frozen=True)
class Limits:
    """Limits for the distance of a measurement from a reference, in nats a token (mean absolute difference).

    noise_nats: below this a difference may be rounding.
    furthest_nats: a larger difference means another model, whatever the distance between the references.
    """

    noise_nats: float
    furthest_nats: float


LOCAL = Limits(noise_nats=FP32_NOISE_NATS, furthest_nats=0.01)
"""Both sides in fp32 from the same weights."""

SERVER = Limits(noise_nats=0.1, furthest_nats=0.25)
"""A server computes in bf16 or less. bf16 logits of size 16-32 come in steps of 0.125, so one is off by up to 0.06.
Both numbers are guesses based on that. A checkpoint trained a little further may be as near as a 4-bit copy (0.09 in
docs/design.md), and ``neither`` is the cautious verdict for larger distances."""


@dataclass(frozen=True)
class Verdict:
    """Which model runs, and its distances from the two references.

    Distances are mean absolute differences of log-probabilities in nats; ``separation`` is the distance between
    the references, ``count`` the number of compared values.
    """

    what: str
    to_true: float
    to_rope: float
    separation: float
    count: int

    @property
    def is_true_model(self) -> bool:
        return self.what == TRUE_MODEL

    def __str__(self) -> str:
        return (
            f"{self.what} ({self.to_true:.4f} nats a token from the true model, {self.to_rope:.4f} from RoPE "
            f"everywhere, which are {self.separation:.4f} apart; {self.count} compared)"
        )


def classify(measured: list[float], true: list[float], rope: list[float], limits: Limits) -> Verdict:
    """Decide which of two references was measured. All three are aligned lists of log-probabilities in nats.

    A reference is chosen when its distance is at most a third of the references' separation: by the triangle
    inequality, the other reference is then at least twice as far. So models with RoPE in some of the NoPE layers are
    ``neither``. ``undecidable``: the measurement is as near as rounding allows, but the references are too near to
    each other.
    """
    to_true, to_rope = _distance(measured, true), _distance(measured, rope)
    separation = _distance(true, rope)
    nearest = min(to_true, to_rope)
    if separation > FP32_NOISE_NATS and nearest <= min(separation / 3, limits.furthest_nats):
        what = TRUE_MODEL if to_true < to_rope else ROPE_EVERYWHERE
    else:
        what = UNDECIDABLE if nearest <= limits.noise_nats else NEITHER
    return Verdict(what, to_true, to_rope, separation, len(measured))


def _distance(a: list[float], b: list[float]) -> float:
    return math.fsum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


@dataclass(frozen=True)
class Scores:
    """Answers to the canary's S sequences of T tokens.

    nll: S lists of T - 1 numbers, ``nll[s][t]`` = -log p(token t+1 | tokens 0..t), in nats.
    top: S lists of P entries {"ids": [...], "logprobs": [...]}, the most likely tokens after each top position.
    """

    nll: list[list[float]]
    top: list[list[dict]]

    def flat_nll(self) -> list[float]:
        return [value for row in self.nll for value in row]

    def flat_top(self) -> list[float]:
        """Top log-probabilities by rank: a server that names tokens by text still gives these numbers."""
        return [value for row in self.top for entry in row for value in entry["logprobs"]]

    def as_dict(self) -> dict:
        return {"nll_nats": self.nll, "top_logprobs": self.top}


@dataclass(frozen=True)
class Canary:
    """The content of nope_canary.json.

    sequences: S x T token ids. top_positions: after which tokens (0-based) the most likely next ones are listed.
    facts: origin of the numbers (dtypes, versions), not needed to compare.
    """

    sequences: list[list[int]]
    top_positions: list[int]
    nope_layers: list[int]
    true_model: Scores
    rope_everywhere: Scores
    facts: dict

    @property
    def separation_nats(self) -> float:
        return _distance(self.true_model.flat_nll(), self.rope_everywhere.flat_nll())

    def classify_nll(self, nll: list[list[float]], limits: Limits) -> Verdict:
        """The verdict on per-token NLLs (S x (T - 1), nats)."""
        flat = [value for row in nll for value in row]
        return classify(flat, self.true_model.flat_nll(), self.rope_everywhere.flat_nll(), limits)

    def classify_top(self, top: list[list[dict]], limits: Limits) -> Verdict:
        """The verdict on top log-probabilities alone, compared by rank."""
        measured = Scores([], top)
        return classify(measured.flat_top(), self.true_model.flat_top(), self.rope_everywhere.flat_top(), limits)

    def as_dict(self) -> dict:
        """The file's content. Numbers are rounded to 1e-6 nats already."""
        separation = self.separation_nats
        return {
            "format_version": FORMAT_VERSION,
            "what": "Log-probabilities (natural log, fp32) of these token ids under this model and under the same "
            "weights with RoPE in every layer. To learn which one a server runs, compare its log-probabilities "
            "with both: python patch_qwen_rope.py --verify_endpoint URL --model_name_or_path DIR",
            **self.facts,
            "nope_layers": self.nope_layers,
            "separation_nats": round(separation, 6),
            "tolerance_nats": round(min(separation / 3, SERVER.furthest_nats), 6),
            "told_apart": {
                "in_fp32": separation > FP32_NOISE_NATS,
                "on_a_bf16_server": separation / 3 >= SERVER.noise_nats,
            },
            "sequences": self.sequences,
            "top_positions": self.top_positions,
            "true_model": self.true_model.as_dict(),
            "rope_everywhere": self.rope_everywhere.as_dict(),
        }


def read_canary(directory: Path) -> Canary:
    """The canary of a model directory.

    Raises: CheckpointError when there is none or it is damaged.
    """
    path = directory / CANARY_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {CANARY_FILE}; final_model of a run with NoPE layers has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {content['format_version']}, this Flare reads {FORMAT_VERSION}")
        canary = Canary(
            sequences=content["sequences"],
            top_positions=content["top_positions"],
            nope_layers=content["nope_layers"],
            true_model=_scores(content["true_model"]),
            rope_everywhere=_scores(content["rope_everywhere"]),
            facts={name: content[name] for name in ("weights_dtype", "transformers_version") if name in content},
        )
        _check_shape(canary)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return canary


def check_recorded_layers(directory: Path, nope_layers: list[int]) -> None:
    """Compare the NoPE layers of a model's config.json with its canary, if it has one. Loads no weights.

    Raises: CheckpointError when they differ.
    """
    if not (directory / CANARY_FILE).is_file():
        return
    recorded = sorted(read_canary(directory).nope_layers)
    if recorded != sorted(nope_layers):
        raise CheckpointError(
            f"config.json of {directory} names NoPE layers {format_layers(nope_layers)}, its {CANARY_FILE} "
            f"{format_layers(recorded)}; {HOW_TO_FIX}"
        )


def copy_canary(source: Path, target: Path) -> bool:
    """Copy the canary, if there is one, to a directory with the same weights in another form (an export).

    Returns: whether there was one.
    """
    if not (source / CANARY_FILE).is_file():
        return False
    shutil.copyfile(source / CANARY_FILE, target / CANARY_FILE)
    return True


def _scores(content: dict) -> Scores:
    return Scores(content["nll_nats"], content["top_logprobs"])


def _check_shape(canary: Canary) -> None:
    """Raises: ValueError when lengths do not match or a value is not a finite number."""
    for scores in (canary.true_model, canary.rope_everywhere):
        for tokens, nll, top in zip(canary.sequences, scores.nll, scores.top, strict=True):
            if len(nll) != len(tokens) - 1 or len(top) != len(canary.top_positions):
                raise ValueError("numbers and tokens do not match")
        if not canary.sequences or not all(map(math.isfinite, scores.flat_nll() + scores.flat_top())):
            raise ValueError("not all log-probabilities are finite numbers")

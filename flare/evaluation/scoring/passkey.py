"""Passkey retrieval: a number is hidden in filler text at a given depth, and the prompt ends with a question for it.

The texts are RULER's task ``niah_single_1`` (arXiv 2404.06654), with the needle at chosen depths.
"""

import math
import random
from dataclasses import dataclass

from torch import nn

from flare.distributed import process_group
from flare.errors import ConfigError
from flare.evaluation.scoring.batches import Engine, Progress
from flare.evaluation.scoring.continuation import Answer, Continuation, encode_pair, score_continuations
from flare.evaluation.scoring.generation import GREEDY, greedy_texts
from flare.logs import log

TEMPLATE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n{context}\nWhat is the special magic number for {key} mentioned in the provided text?"
)
ANSWER_PREFIX = " The special magic number for {key} mentioned in the provided text is"
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ADJECTIVES = "ancient brave calm distant eager faint gentle hollow jolly keen loud mellow noble odd plain".split()
NOUNS = "anchor bridge castle desert engine forest garden harbor island jungle kettle ladder mirror".split()
DEPTHS = (0, 25, 50, 75, 100)
"""Percent of the filler text before the needle."""

VALUE_DIGITS = 7
MIN_LINES = 4
"""Lines of filler in the shortest text; with fewer, the depths would coincide."""

GENERATED_TOKENS = 128
"""Limit of new tokens in RULER."""


@dataclass(frozen=True)
class Sample:
    """A text with its question, and the number that is the answer."""

    context_length: int
    depth_percent: int
    prompt: str
    value: str

    def pair(self, tokenizer) -> Continuation:
        """Tokens of the prompt (context) and of the number (target)."""
        return encode_pair(tokenizer, self.prompt, " " + self.value)


def write_prompt(key: str, value: str, depth_percent: int, noise_lines: int) -> str:
    """Text with the needle after ``depth_percent`` of its filler, the question, and the start of the answer."""
    lines = [NOISE] * noise_lines
    lines.insert(round(noise_lines * depth_percent / 100), NEEDLE.format(key=key, value=value))
    return TEMPLATE.format(context="\n".join(lines), key=key) + ANSWER_PREFIX.format(key=key)


def make_samples(tokenizer, lengths: list[int], depths: tuple[int, ...], per_cell: int, seed: int = 0) -> list[Sample]:
    """Samples for every length and depth, deterministic for a tokenizer and seed.

    Prompt and number together fill the length as far as complete lines of filler allow. Lengths that are too short
    for a needle are skipped.

    Raises: ConfigError if every length is too short.
    """
    key, value = f"{ADJECTIVES[0]}-{NOUNS[0]}", "1" * VALUE_DIGITS
    least = _tokens(tokenizer, write_prompt(key, value, 50, MIN_LINES), value)
    samples = []
    for length in lengths:
        if length < least:
            log.info(f"passkey: no text of {length:,} tokens (this tokenizer needs at least {least:,})")
            continue
        for depth in depths:
            for number in range(per_cell):
                draw = random.Random(f"{seed} {length} {depth} {number}")
                key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
                value = str(draw.randint(10 ** (VALUE_DIGITS - 1), 10**VALUE_DIGITS - 1))
                lines = _noise_lines(tokenizer, key, value, length)
                samples.append(Sample(length, depth, write_prompt(key, value, depth, lines), value))
    if not samples:
        raise ConfigError(
            f"a passkey needs at least {least:,} tokens of this tokenizer; longest requested: {lengths[-1]}"
        )
    return samples


def _tokens(tokenizer, prompt: str, value: str) -> int:
    return len(tokenizer(f"{prompt} {value}", verbose=False)["input_ids"])


def _noise_lines(tokenizer, key: str, value: str, length: int) -> int:
    """Largest number of filler lines with which prompt and number fit into ``length`` tokens."""
    empty, ten = (_tokens(tokenizer, write_prompt(key, value, 50, lines), value) for lines in (0, 10))
    lines = max(0, int((length - empty) / ((ten - empty) / 10)) + 2)
    while lines and _tokens(tokenizer, write_prompt(key, value, 50, lines), value) > length:
        lines -= 1
    return lines


def score_passkey(
    engine: Engine, tokenizer, samples: list[Sample], generate: bool, progress: Progress | None = None
) -> list[dict]:
    """Passkey accuracy by length and depth, teacher-forced and optionally generated. A collective.

    Returns: rows with
        accuracy: percent of samples in which every token of the number is the argmax;
        value_loss: mean NLL of a token of the numbers, nats;
        generated_accuracy: percent whose greedy output contains the number (RULER's ``string_match_all``), or None.
    """
    answers = score_continuations(engine, [sample.pair(tokenizer) for sample in samples], progress=progress)
    outputs = generate_answers(engine, tokenizer, samples) if generate else None
    rows = []
    for cell in dict.fromkeys((s.context_length, s.depth_percent) for s in samples):
        members = [i for i, s in enumerate(samples) if (s.context_length, s.depth_percent) == cell]
        generated = None
        if outputs:
            generated = string_match_all([outputs[i] for i in members], [[samples[i].value] for i in members])
        rows.append(_row(cell, [answers[i] for i in members], generated))
    return rows


def _row(cell: tuple[int, int], answers: list[Answer], generated: float | None) -> dict:
    nll, tokens = math.fsum(answer.nll for answer in answers), sum(answer.num_tokens for answer in answers)
    return {
        "context_length": cell[0],
        "depth_percent": cell[1],
        "accuracy": 100.0 * sum(answer.greedy for answer in answers) / len(answers),
        "value_loss": nll / tokens,
        "num_samples": len(answers),
        "generated_accuracy": generated,
    }


def generate_answers(engine: Engine, tokenizer, samples: list[Sample]) -> list[str]:
    """Greedy continuation of each prompt, until it contains the number or reaches the token limit."""
    model: nn.Module = engine.scorer.model
    mine = list(range(len(samples)))[engine.world.rank :: engine.world.size]

    def my_share() -> dict[int, str]:
        prompts = [samples[i].pair(tokenizer).context for i in mine]
        sizes = max(1, engine.batch_tokens // max(map(len, prompts), default=1))
        texts: list[str] = []
        for first in range(0, len(mine), sizes):
            part = mine[first : first + sizes]
            values = [samples[i].value for i in part]
            settings = GREEDY | {"max_new_tokens": GENERATED_TOKENS}
            texts += greedy_texts(model, tokenizer, prompts[first : first + sizes], settings, values)
        return dict(zip(mine, texts, strict=True))

    found = {
        index: text for part in process_group.run_on_all_ranks(engine.world, my_share) for index, text in part.items()
    }
    return [found[index] for index in range(len(samples))]


def string_match_all(predictions: list[str], references: list[list[str]]) -> float:
    """Percent of references contained in the output, ignoring case; mean over the samples.

    Source: RULER, ``scripts/eval/synthetic/constants.py``.
    """
    shares = [
        sum(reference.lower() in prediction.lower() for reference in wanted) / len(wanted)
        for prediction, wanted in zip(predictions, references, strict=True)
    ]
    return 100.0 * sum(shares) / len(shares)

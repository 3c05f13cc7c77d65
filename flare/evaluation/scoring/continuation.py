"""Log-likelihood of continuations given their context; used by LAMBADA and passkeys."""

from dataclasses import dataclass

from flare.distributed import process_group
from flare.evaluation.scoring.batches import Engine, Progress
from flare.evaluation.scoring.scorer import check_length, check_vocabulary
from flare.evaluation.scoring.windows import Window


@dataclass(frozen=True)
class Continuation:
    """A context and its target, as token ids; both have at least one token."""

    context: list[int]
    target: list[int]

    @property
    def sequence(self) -> list[int]:
        return [*self.context, *self.target]


@dataclass(frozen=True)
class Answer:
    """Sum of the NLL of the target (nats), its number of tokens, and whether every token was the argmax."""

    nll: float
    num_tokens: int
    greedy: bool
    truncated: bool


def encode_pair(tokenizer, context: str, target: str) -> Continuation:
    """Tokenize context and target as one text and split it at the length of the context.

    Spaces at the end of the context are moved to the target, because tokenizers join a space with the following word.
    The tokenizer adds its special tokens: Llama and Gemma need bos at the start.

    Source: lm-eval, ``TemplateLM._encode_pair``.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        target = context[-spaces:] + target
        context = context[:-spaces]
    whole = tokenizer(context + target, verbose=False)["input_ids"]
    length = len(tokenizer(context, verbose=False)["input_ids"])
    return Continuation(whole[:length], whole[length:])


def score_continuations(
    engine: Engine, pairs: list[Continuation], max_length: int | None = None, progress: Progress | None = None
) -> list[Answer]:
    """Score each target given its context; a collective.

    Args:
        max_length: largest input in tokens; longer contexts are truncated on the left.
    Returns: scores in the order of ``pairs``, the same on every rank.
    """
    sequences = [pair.sequence for pair in pairs]
    windows = []
    for index, (pair, sequence) in enumerate(zip(pairs, sequences, strict=True)):
        start = max(0, len(sequence) - 1 - max_length) if max_length else 0
        windows.append(Window(index, start, max(len(pair.context), start + 1), len(sequence)))
    check_vocabulary(engine.scorer.model, max(max(sequence) for sequence in sequences))
    check_length(engine.scorer.model, max(window.input_length for window in windows))

    def my_share() -> dict[int, Answer]:
        answers = {}
        for scored in engine.score(windows, sequences, progress):
            for window, losses, hits in scored.per_window():
                answers[window.document] = Answer(float(losses.sum()), len(losses), bool(hits.all()), window.start > 0)
        return answers

    found = {
        index: answer
        for part in process_group.run_on_all_ranks(engine.world, my_share)
        for index, answer in part.items()
    }
    return [found[index] for index in range(len(pairs))]

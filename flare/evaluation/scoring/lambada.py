"""LAMBADA: prediction of the last word of a passage, which requires the complete passage.

Source: Paperno et al. 2016 (arXiv 1606.06031); same metrics as lm-eval's task ``lambada_openai``.
"""

import math

from flare.errors import DataError
from flare.evaluation.scoring.batches import Engine, Progress
from flare.evaluation.scoring.continuation import Answer, Continuation, encode_pair, score_continuations
from flare.evaluation.scoring.perplexity import finite_exp


def split_last_word(text: str) -> tuple[str, str] | None:
    """(text before the last space, text after it); None if one of them is empty."""
    context, _, word = text.rpartition(" ")
    return (context, word) if context.strip() and word else None


def last_word(tokenizer, text: str) -> Continuation:
    """The passage without its last word as context, and the word with its leading space as target.

    Raises: DataError for a text of one word.
    """
    parts = split_last_word(text)
    if parts is None:
        raise DataError(f"LAMBADA: no last word after a context in {text[:40]!r}")
    return encode_pair(tokenizer, parts[0], " " + parts[1])


def score_lambada(
    engine: Engine, tokenizer, texts: list[str], max_length: int | None = None, progress: Progress | None = None
) -> dict:
    """Accuracy and perplexity of the last words; a collective.

    Returns:
        lambada_accuracy: percent of texts for which every token of the last word is the argmax.
        lambada_perplexity: exp(-mean log-likelihood of the last word), per word.
        lambada_truncated: number of contexts that were longer than ``max_length``.
    """
    answers = score_continuations(engine, [last_word(tokenizer, text) for text in texts], max_length, progress)
    return lambada_metrics(answers)


def lambada_metrics(answers: list[Answer]) -> dict:
    """The metrics of scored last words."""
    mean = math.fsum(answer.nll for answer in answers) / len(answers)
    return {
        "lambada_accuracy": 100.0 * sum(answer.greedy for answer in answers) / len(answers),
        "lambada_perplexity": finite_exp(mean),
        "lambada_truncated": sum(answer.truncated for answer in answers),
    }

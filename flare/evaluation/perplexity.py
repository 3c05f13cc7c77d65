"""Perplexity and its relatives of a list of documents, by protocol ``document``.

Logits are fp32; NLLs (nats) and counts are summed in float64, and only sums are ever added: over windows,
documents and, where there are several processes, ranks. Every token of a document is scored exactly once.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import nn

from flare.errors import ConfigError, DataError, FlareError
from flare.evaluation.scorer import TokenScorer, check_length, check_vocabulary
from flare.evaluation.windows import Window, document_windows
from flare.loss import IGNORE_INDEX

TOKENIZE_CHUNK = 256
"""Documents that go to the tokenizer at once: enough for its threads, few enough to stay small."""


@dataclass(frozen=True)
class DatasetScore:
    """What one data set says about one model. Fields with ``json`` are those of evaluation_results.json.

    Metrics (sums over all documents; source of the definitions: lm-eval's ``wikitext`` task):
        loss: sum NLL / tokens, nats.
        perplexity: exp(loss).
        bits_per_byte: sum NLL / (ln 2 x UTF-8 bytes of the text); comparable between tokenizers.
        word_perplexity, byte_perplexity: exp(sum NLL / words or bytes); None where it overflows a float,
            as the first does for Chinese: words are what white space separates.
        token_accuracy: share of targets that are the argmax, in percent.
        loss_by_position: ``{"from", "to", "loss", "num_tokens"}`` by position id of the input token that
            predicts, ``from <= position < to``; position 0 sees one token. The mean of the buckets
            weighted by ``num_tokens`` is ``loss``.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    truncated_documents: int  # this protocol reads every document to its end: 0
    loss: float
    perplexity: float | None
    bits_per_byte: float
    word_perplexity: float | None
    byte_perplexity: float | None
    token_accuracy: float
    loss_by_position: list[dict]
    # Per document, float64 and int64 (num_documents,): what a bootstrap over documents resamples.
    document_nll: np.ndarray = field(repr=False, metadata={"json": False})
    document_tokens: np.ndarray = field(repr=False, metadata={"json": False})
    # Throughput: the first batch is warm-up and not in it, unless it is the only one.
    timed_tokens: int = field(repr=False, metadata={"json": False})
    timed_sec: float = field(repr=False, metadata={"json": False})

    def to_json(self) -> dict:
        """The entry of this data set in evaluation_results.json."""
        kept = (f.name for f in fields(self) if f.metadata.get("json", True))
        return {"status": "ok"} | {name: getattr(self, name) for name in kept}


def score_documents(
    model: nn.Module,
    tokenizer,
    texts: list[str],
    *,
    max_length: int,
    batch_size: int,
    device: torch.device | str,
    prefix_token_id: int | None = None,
    min_tokens: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetScore:
    """Score every token of every document, each document alone.

    Args:
        model: causal LM of transformers on its device; ``device`` is where its input ids belong.
        tokenizer: its tokenizer. Documents get no special tokens added: the prefix stands in front of
            each, unscored. (lm-eval does the same under ``add_bos_token=False``; its default scores
            Llama's bos as if it were text.)
        texts: the documents; empty ones hold nothing to score and are not counted.
        max_length: tokens that the model sees at most. batch_size: windows a forward pass.
        prefix_token_id: what the first token is conditioned on; default bos, else eos.
        min_tokens: fewer than these is an error, not a number with no meaning.
        progress: called with (tokens scored, tokens in all) after every batch.

    Raises:
        DataError: no document, no token, fewer than ``min_tokens``, text that is not Unicode.
        ConfigError: the tokenizer is not the model's, or no prefix, or windows that the model can't take.
        FlareError: a loss that is not finite, with the document's number.
    """
    prefix = resolve_prefix(tokenizer, prefix_token_id)
    sequences = tokenize_documents(tokenizer, texts, prefix)
    tally = _Tally(len(texts), max_length)
    _count_text(tally, texts, sequences)
    if tally.num_tokens < max(min_tokens, 1):
        raise DataError(
            f"{len(texts)} documents with {tally.num_tokens} tokens; at least {max(min_tokens, 1)} are needed"
        )
    check_vocabulary(model, max(max(sequence) for sequence in sequences))
    check_length(model, min(max_length, max(len(sequence) for sequence in sequences) - 1))
    scorer = TokenScorer(model, device, max(sequences, key=len))
    windows = [w for i, s in enumerate(sequences) for w in document_windows(i, len(s) - 1, max_length)]
    for batch in length_sorted_batches(windows, batch_size):
        t0 = time.perf_counter()
        losses, hits = scorer.score(*pad_batch(batch, sequences, prefix))
        seconds = time.perf_counter() - t0
        _check_finite(losses, batch, texts)
        tally.add(batch, losses.double().numpy(), hits.numpy(), seconds)
        if progress is not None:
            progress(tally.scored_tokens, tally.num_tokens)
    return tally.score()


def resolve_prefix(tokenizer, prefix_token_id: int | None = None) -> int:
    """The token in front of every document: as given, else bos, else eos.

    Raises: ConfigError when the tokenizer has neither.
    """
    for token_id in (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError("the tokenizer has neither a bos nor an eos token; give --prefix_token_id")


def tokenize_documents(tokenizer, texts: list[str], prefix: int) -> list[list[int]]:
    """``[prefix, tokens...]`` per document. A document longer than the model's context is no mistake here."""
    sequences: list[list[int]] = []
    for first in range(0, len(texts), TOKENIZE_CHUNK):
        chunk = texts[first : first + TOKENIZE_CHUNK]
        for offset, text in enumerate(chunk):
            _check_text(text, first + offset)
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        sequences.extend([prefix, *ids] for ids in encoded)
    return sequences


def length_sorted_batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batches of like lengths, longest first: little padding, and memory runs out at once or never."""
    ordered = sorted(windows, key=lambda w: -w.input_length)
    for first in range(0, len(ordered), batch_size):
        yield ordered[first : first + batch_size]


def pad_batch(batch: list[Window], sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and shifted labels, padded on the right: (B, T) int64 each. Padding asks for nothing."""
    longest = max(window.input_length for window in batch)
    input_ids = torch.full((len(batch), longest), pad_id, dtype=torch.long)
    labels = torch.full((len(batch), longest), IGNORE_INDEX, dtype=torch.long)
    for row, window in enumerate(batch):
        sequence = sequences[window.document]
        input_ids[row, : window.input_length] = torch.tensor(window.inputs(sequence))
        labels[row, : window.input_length] = torch.tensor(window.labels(sequence, IGNORE_INDEX))
    return input_ids, labels


def position_edges(max_length: int) -> list[int]:
    """Edges of the position buckets: 0, 1, 2, 3, 4, 6, 8, 12, ... (half octaves), ``max_length``."""
    edges, octave = [0, 1], 2
    while octave < 2 * max_length:
        edges += [octave, octave * 3 // 2]
        octave *= 2
    return [edge for edge in edges if edge < max_length] + [max_length]


def finite_exp(exponent: float) -> float | None:
    """exp, or None where a float cannot hold it: JSON has no infinity."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return None


class _Tally:
    """Running float64 sums of one data set."""

    def __init__(self, num_texts: int, max_length: int) -> None:
        self.num_bytes = self.num_words = self.num_tokens = self.scored_tokens = self.hits = 0
        self.counted = np.zeros(num_texts, dtype=bool)
        self.document_nll = np.zeros(num_texts, dtype=np.float64)
        self.document_tokens = np.zeros(num_texts, dtype=np.int64)
        self.edges = np.array(position_edges(max_length))
        self.bucket_nll = np.zeros(len(self.edges) - 1, dtype=np.float64)
        self.bucket_tokens = np.zeros(len(self.edges) - 1, dtype=np.int64)
        self.batches: list[tuple[int, float]] = []

    def add(self, batch: list[Window], losses: np.ndarray, hits: np.ndarray, seconds: float) -> None:
        """Add the targets of a batch: (n,) float64 NLLs and (n,) hits in the order of its windows."""
        documents = np.concatenate([np.full(w.stop - w.first_target, w.document) for w in batch])
        # The target s[i] is predicted from the input s[i - 1]; position ids count from the window's start.
        positions = np.concatenate([np.arange(w.first_target, w.stop) - 1 - w.start for w in batch])
        buckets = np.searchsorted(self.edges, positions, side="right") - 1
        np.add.at(self.document_nll, documents, losses)
        np.add.at(self.document_tokens, documents, 1)
        np.add.at(self.bucket_nll, buckets, losses)
        np.add.at(self.bucket_tokens, buckets, 1)
        self.hits += int(hits.sum())
        self.scored_tokens += len(losses)
        self.batches.append((len(losses), seconds))

    def score(self) -> DatasetScore:
        """The metrics of what was added."""
        nll, tokens = float(self.document_nll.sum()), self.scored_tokens
        timed = self.batches[1:] or self.batches
        return DatasetScore(
            num_documents=int(self.counted.sum()),
            num_tokens=tokens,
            num_bytes=self.num_bytes,
            num_words=self.num_words,
            truncated_documents=0,
            loss=nll / tokens,
            perplexity=finite_exp(nll / tokens),
            bits_per_byte=nll / (math.log(2) * self.num_bytes),
            word_perplexity=finite_exp(nll / self.num_words),
            byte_perplexity=finite_exp(nll / self.num_bytes),
            token_accuracy=100.0 * self.hits / tokens,
            loss_by_position=self._buckets(),
            document_nll=self.document_nll[self.counted],
            document_tokens=self.document_tokens[self.counted],
            timed_tokens=sum(count for count, _ in timed),
            timed_sec=sum(seconds for _, seconds in timed),
        )

    def _buckets(self) -> list[dict]:
        rows = zip(self.edges[:-1], self.edges[1:], self.bucket_nll, self.bucket_tokens, strict=True)
        return [
            {"from": int(low), "to": int(high), "loss": float(nll / count), "num_tokens": int(count)}
            for low, high, nll, count in rows
            if count
        ]


def _count_text(tally: _Tally, texts: list[str], sequences: list[list[int]]) -> None:
    """Bytes, words and tokens of the documents that have a token to score."""
    for i, (text, sequence) in enumerate(zip(texts, sequences, strict=True)):
        if len(sequence) > 1:
            tally.counted[i] = True
            tally.num_tokens += len(sequence) - 1
            tally.num_bytes += len(text.encode("utf-8"))
            tally.num_words += len(re.split(r"\s+", text))


def _check_text(text: str, index: int) -> None:
    """A lone surrogate (JSON can hold one) has no UTF-8 form and so no bytes to count."""
    if not isinstance(text, str):
        raise DataError(f"document {index} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"document {index} at character {error.start}"
        raise DataError(f"{where} is not valid Unicode: {text[:40]!r}") from error


def _check_finite(losses: torch.Tensor, batch: list[Window], texts: list[str]) -> None:
    if torch.isfinite(losses).all():
        return
    first = int(torch.isfinite(losses).logical_not().nonzero()[0])
    ends = np.cumsum([w.stop - w.first_target for w in batch])
    document = batch[int(np.searchsorted(ends, first, side="right"))].document
    raise FlareError(
        f"the loss of document {document} ({texts[document][:40]!r}...) is {float(losses[first])}; "
        "the weights or the precision are not right (try --precision fp32)"
    )

"""Perplexity and related metrics of a list of documents.

Logits are fp32; NLLs (nats) and counts are summed in float64 over windows, documents and ranks.
Every token of a document is scored exactly once.
"""

import math
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import nn

from flare.distributed import process_group
from flare.distributed.process_group import World
from flare.errors import DataError
from flare.evaluation.scoring.batches import ALONE, Engine, Progress, Scored
from flare.evaluation.scoring.scorer import TokenScorer, check_length, check_vocabulary
from flare.evaluation.scoring.token_sequences import Corpus, Protocol, make_corpus, resolve_prefix
from flare.evaluation.scoring.windows import document_windows


@dataclass(frozen=True)
class DatasetScore:
    """Scores of one model on one data set. Fields without ``json: False`` are written to evaluation_results.json.

    Metrics (sums over all documents; source of the definitions: lm-eval's ``wikitext`` task):
        loss: sum NLL / tokens, nats.
        perplexity: exp(loss).
        bits_per_byte: sum NLL / (ln 2 x UTF-8 bytes of the text); comparable between tokenizers.
        word_perplexity, byte_perplexity: exp(sum NLL / words or bytes); None if it overflows. Words are separated
            by white space, so word perplexity overflows for Chinese.
        token_accuracy: share of targets that are the argmax, in percent.
        loss_by_position: ``{"from", "to", "loss", "num_tokens"}`` by position id of the input token,
            ``from <= position < to``; position 0 sees one token. The mean of the buckets weighted by ``num_tokens``
            equals ``loss``.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_words: int
    truncated_documents: int  # every protocol reads every document to its end: 0
    loss: float
    perplexity: float | None
    bits_per_byte: float
    word_perplexity: float | None
    byte_perplexity: float | None
    token_accuracy: float
    loss_by_position: list[dict]
    # Per document, float64 and int64 (num_documents,): resampled by the bootstrap over documents.
    document_nll: np.ndarray = field(repr=False, metadata={"json": False})
    document_tokens: np.ndarray = field(repr=False, metadata={"json": False})
    document_bytes: np.ndarray = field(repr=False, metadata={"json": False})
    # Throughput: the first batch is warm-up and excluded, unless it is the only one.
    timed_tokens: int = field(repr=False, metadata={"json": False})
    timed_sec: float = field(repr=False, metadata={"json": False})

    def to_json(self) -> dict:
        """The entry of this data set in evaluation_results.json."""
        kept = (f.name for f in fields(self) if f.metadata.get("json", True))
        return {"status": "ok"} | {name: getattr(self, name) for name in kept}

    def to_dict(self) -> dict:
        """All fields as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> "DatasetScore":
        """Restore a score from ``to_dict``."""
        types = {"document_nll": np.float64, "document_tokens": np.int64, "document_bytes": np.int64}
        return cls(**values | {name: np.array(values[name], dtype=dtype) for name, dtype in types.items()})


def score_documents(
    model: nn.Module,
    tokenizer,
    texts: list[str],
    *,
    max_length: int,
    batch_size: int,
    device: torch.device | str,
    stride: int | None = None,
    protocol: Protocol = "document",
    prefix_token_id: int | None = None,
    min_tokens: int = 1,
    world: World = ALONE,
    progress: Progress | None = None,
) -> DatasetScore:
    """Score every token of every document.

    Args:
        model: causal LM of transformers on its device; ``device`` is where its input ids belong.
        tokenizer: its tokenizer. No special tokens are added to documents; each one follows the prefix, which is not
            scored. (Same as lm-eval with ``add_bos_token=False``; its default scores Llama's bos as text.)
        texts: the documents; empty ones are not counted.
        max_length: largest input in tokens.
        stride, protocol: see ``document_windows`` and ``make_corpus``.
        batch_size: full windows per forward pass; more windows if they are shorter, with the same number of tokens.
        prefix_token_id: context of the first token; default: bos, else eos.
        min_tokens: fewer tokens are an error.
        world: windows are distributed over the ranks, and all return the same score (a collective).

    Raises:
        DataError: no document, no token, fewer than ``min_tokens``, text that is not Unicode.
        ConfigError: tokenizer and model do not match, no prefix, or windows that are too long for the model.
        FlareError: a non-finite loss, with the index of the document.
    """
    corpus = make_corpus(tokenizer, texts, resolve_prefix(tokenizer, prefix_token_id), protocol)
    if corpus.total_tokens < max(min_tokens, 1):
        raise DataError(
            f"{len(texts)} documents with {corpus.total_tokens} tokens; at least {max(min_tokens, 1)} are needed"
        )
    check_vocabulary(model, max(max(sequence) for sequence in corpus.sequences))
    check_length(model, min(max_length, len(corpus.longest) - 1))
    windows = [w for i, s in enumerate(corpus.sequences) for w in document_windows(i, len(s) - 1, max_length, stride)]

    def my_share() -> _Tally:
        engine = Engine(TokenScorer(model, device, corpus.longest), batch_size * max_length, world)
        tally = _Tally(corpus, max_length)
        for scored in engine.score(windows, corpus.sequences, progress):
            tally.add(scored, corpus)
        return tally

    first, *others = process_group.run_on_all_ranks(world, my_share)
    for other in others:
        first.merge(other)
    return first.score(corpus)


def position_edges(max_length: int) -> list[int]:
    """Edges of the position buckets: 0, 1, 2, 3, 4, 6, 8, 12, ... (half octaves), ``max_length``."""
    edges, octave = [0, 1], 2
    while octave < 2 * max_length:
        edges += [octave, octave * 3 // 2]
        octave *= 2
    return [edge for edge in edges if edge < max_length] + [max_length]


def finite_exp(exponent: float) -> float | None:
    """exp(x), or None on overflow, because JSON has no infinity."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return None


class _Tally:
    """Running float64 sums of one data set on one rank."""

    def __init__(self, corpus: Corpus, max_length: int) -> None:
        self.hits = 0
        self.document_nll = np.zeros(corpus.num_documents, dtype=np.float64)
        self.document_tokens = np.zeros(corpus.num_documents, dtype=np.int64)
        self.edges = np.array(position_edges(max_length))
        self.bucket_nll = np.zeros(len(self.edges) - 1, dtype=np.float64)
        self.bucket_tokens = np.zeros(len(self.edges) - 1, dtype=np.int64)
        self.timed_tokens, self.timed_sec, self.warm_up = 0, 0.0, None

    def add(self, scored: Scored, corpus: Corpus) -> None:
        """Add the targets of a batch; separators between documents are not counted."""
        windows = scored.windows
        documents = np.concatenate([corpus.owners[w.document][w.first_target : w.stop] for w in windows])
        # The target s[i] is predicted from the input s[i - 1]; position ids count from the window's start.
        positions = np.concatenate([np.arange(w.first_target, w.stop) - 1 - w.start for w in windows])
        buckets = np.searchsorted(self.edges, positions, side="right") - 1
        wanted = documents >= 0
        documents, buckets, losses = documents[wanted], buckets[wanted], scored.losses[wanted]
        np.add.at(self.document_nll, documents, losses)
        np.add.at(self.document_tokens, documents, 1)
        np.add.at(self.bucket_nll, buckets, losses)
        np.add.at(self.bucket_tokens, buckets, 1)
        self.hits += int(scored.hits[wanted].sum())
        self._time(len(losses), scored.seconds)

    def _time(self, tokens: int, seconds: float) -> None:
        """The first batch is warm-up."""
        if self.warm_up is None:
            self.warm_up = (tokens, seconds)
        else:
            self.timed_tokens += tokens
            self.timed_sec += seconds

    def merge(self, other: "_Tally") -> None:
        """Add the sums of another rank. Ranks run at the same time, so the time is that of the slowest."""
        for name in ("hits", "document_nll", "document_tokens", "bucket_nll", "bucket_tokens", "timed_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.timed_sec = max(self.timed_sec, other.timed_sec)

    def score(self, corpus: Corpus) -> DatasetScore:
        """Metrics of all added batches."""
        counted = corpus.tokens > 0
        nll, tokens = float(self.document_nll.sum()), int(self.document_tokens.sum())
        num_bytes, num_words = int(corpus.num_bytes.sum()), int(corpus.num_words.sum())
        timed = (self.timed_tokens, self.timed_sec) if self.timed_sec else self.warm_up
        return DatasetScore(
            num_documents=int(counted.sum()),
            num_tokens=tokens,
            num_bytes=num_bytes,
            num_words=num_words,
            truncated_documents=0,
            loss=nll / tokens,
            perplexity=finite_exp(nll / tokens),
            bits_per_byte=nll / (math.log(2) * num_bytes),
            word_perplexity=finite_exp(nll / num_words),
            byte_perplexity=finite_exp(nll / num_bytes),
            token_accuracy=100.0 * self.hits / tokens,
            loss_by_position=self._buckets(),
            document_nll=self.document_nll[counted],
            document_tokens=self.document_tokens[counted],
            document_bytes=corpus.num_bytes[counted],
            timed_tokens=timed[0] if timed else 0,
            timed_sec=timed[1] if timed else 0.0,
        )

    def _buckets(self) -> list[dict]:
        rows = zip(self.edges[:-1], self.edges[1:], self.bucket_nll, self.bucket_tokens, strict=True)
        return [
            {"from": int(low), "to": int(high), "loss": float(nll / count), "num_tokens": int(count)}
            for low, high, nll, count in rows
            if count
        ]

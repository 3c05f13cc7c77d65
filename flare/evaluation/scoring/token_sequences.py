"""Texts as token sequences for ``--protocol``: one sequence per document, or all documents joined.

A sequence is ``[prefix, t0, t1, ...]``. The prefix is the context of the first token.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flare.errors import ConfigError, DataError

TOKENIZE_CHUNK = 256
"""Documents per tokenizer call: enough for its threads, few enough to limit memory."""

NOT_SCORED = -1

Protocol = Literal["document", "concat"]


@dataclass(frozen=True)
class Corpus:
    """Sequences, and for every entry of a sequence the index of its document (``NOT_SCORED`` for separators)."""

    sequences: list[list[int]]
    owners: list[np.ndarray]
    num_documents: int
    tokens: np.ndarray  # per document: (num_documents,) int64
    num_bytes: np.ndarray
    num_words: np.ndarray

    @property
    def total_tokens(self) -> int:
        """Tokens that are scored."""
        return int(self.tokens.sum())

    @property
    def longest(self) -> list[int]:
        """The longest sequence."""
        return max(self.sequences, key=len)


def make_corpus(tokenizer, texts: list[str], prefix: int, protocol: Protocol = "document") -> Corpus:
    """Tokenize texts and arrange them in sequences.

    Args:
        protocol: ``document``: one sequence per document, after the prefix. ``concat``: one sequence with eos between
            documents, as in training with ``--packing concat``. Separators are not scored, so both protocols score
            the same tokens.

    Raises: DataError for values that are not text; ConfigError for concat without an eos token.
    """
    sequences = tokenize_documents(tokenizer, texts, prefix)
    tokens = np.array([len(sequence) - 1 for sequence in sequences], dtype=np.int64)
    has_tokens = tokens > 0  # an empty text is not counted as a document
    counts = (
        np.where(has_tokens, [len(text.encode("utf-8")) for text in texts], 0).astype(np.int64),
        np.where(has_tokens, [len(re.split(r"\s+", text)) for text in texts], 0).astype(np.int64),
    )
    if protocol == "concat":
        if tokenizer.eos_token_id is None:
            raise ConfigError("--protocol concat: the tokenizer has no eos token to join documents with")
        sequences, owners = _joined(sequences, prefix, tokenizer.eos_token_id)
    else:
        owners = [_owners(i, len(sequence)) for i, sequence in enumerate(sequences)]
    return Corpus(sequences, owners, len(texts), tokens, *counts)


def resolve_prefix(tokenizer, prefix_token_id: int | None = None) -> int:
    """The token before every document: as given, else bos, else eos.

    Raises: ConfigError if the tokenizer has neither, or the given id is not in its vocabulary.
    """
    if prefix_token_id is not None and not 0 <= prefix_token_id < len(tokenizer):
        raise ConfigError(f"--prefix_token_id {prefix_token_id}: the tokenizer has 0 to {len(tokenizer) - 1}")
    for token_id in (prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError("the tokenizer has neither a bos nor an eos token; give --prefix_token_id")


def tokenize_documents(tokenizer, texts: list[str], prefix: int) -> list[list[int]]:
    """``[prefix, tokens...]`` per document. Documents may be longer than the context of the model.

    Raises: DataError for values that are not text.
    """
    sequences: list[list[int]] = []
    for first in range(0, len(texts), TOKENIZE_CHUNK):
        chunk = texts[first : first + TOKENIZE_CHUNK]
        for offset, text in enumerate(chunk):
            _check_text(text, first + offset)
        encoded = tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        sequences.extend([prefix, *ids] for ids in encoded)
    return sequences


def _joined(sequences: list[list[int]], prefix: int, separator: int) -> tuple[list[list[int]], list[np.ndarray]]:
    """Join all sequences in order."""
    joined, owners = [], []
    for i, sequence in enumerate(sequences):
        if len(sequence) == 1:
            continue
        joined += [separator if joined else prefix, *sequence[1:]]
        owners.append(_owners(i, len(sequence)))
    return ([joined], [np.concatenate(owners)]) if joined else ([], [])


def _owners(document: int, length: int) -> np.ndarray:
    owners = np.full(length, document, dtype=np.int32)
    owners[0] = NOT_SCORED
    return owners


def _check_text(text: str, index: int) -> None:
    """Check for text. A lone surrogate (possible in JSON) cannot be encoded as UTF-8, so it has no byte count."""
    if not isinstance(text, str):
        raise DataError(f"document {index} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        where = f"document {index} at character {error.start}"
        raise DataError(f"{where} is not valid Unicode: {text[:40]!r}") from error

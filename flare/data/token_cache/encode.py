"""Tokenises documents; each ends with the end-of-text token. Imports no torch, so that worker processes start fast."""

import hashlib
import json
from array import array
from collections.abc import Iterator

import numpy as np

from flare.errors import DataError

END_OF_TEXT = "<|endoftext|>"
BATCH_CHARACTERS = 2_000_000
"""Text per tokenizer call: enough for all threads, and little memory."""


class Encoder:
    """A tokenizer with the settings of the cache: no special tokens, no truncation, no padding.

    Args:
        backend: a Rust ``tokenizers.Tokenizer``, or a tokenizer in Python that is called with texts.
        end_id: id of the end-of-text token.
        vocab_size: decides the dtype of the stored ids.
    """

    def __init__(self, backend: object, end_id: int, vocab_size: int) -> None:
        self.backend = backend
        self.end_id = end_id
        self.vocab_size = vocab_size
        self.dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        if self.is_fast:  # tokenizer.json may enable both, which would change documents
            backend.no_truncation()
            backend.no_padding()

    @classmethod
    def of(cls, tokenizer: object) -> "Encoder":
        """The encoder of a transformers tokenizer. Raises: DataError when it has no end-of-text token."""
        backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else tokenizer
        return cls(backend, end_of_text_id(tokenizer), len(tokenizer))

    @property
    def is_fast(self) -> bool:
        """Whether this is a Rust tokenizer, which can be sent to another process as text."""
        return hasattr(self.backend, "encode_batch_fast")

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each document, with the end-of-text token at the end."""
        if self.is_fast:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            ids = (encoding.ids for encoding in encodings)
        else:
            ids = self.backend(texts, add_special_tokens=False)["input_ids"]
        return [self._as_array(document) for document in ids]

    def _as_array(self, ids: list[int]) -> np.ndarray:
        """``array`` converts a list of ints three times as fast as numpy (docs/experiments.md)."""
        ids.append(self.end_id)
        return np.frombuffer(array("H" if self.dtype.itemsize == 2 else "I", ids), self.dtype)

    def to_message(self) -> dict:
        """What a worker process needs to create the same encoder."""
        return {"tokenizer": self.backend.to_str(), "end_id": self.end_id, "vocab_size": self.vocab_size}

    @classmethod
    def from_message(cls, message: dict) -> "Encoder":
        """The encoder that ``to_message`` describes."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(message["tokenizer"]), message["end_id"], message["vocab_size"])


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Batches of texts with about ``BATCH_CHARACTERS`` each."""
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def end_of_text_id(tokenizer: object) -> int:
    """The id of the token that ends a document: <|endoftext|> if the tokenizer has it, else its EOS token.

    Raises: DataError when the tokenizer has neither.
    """
    known = tokenizer.get_vocab()
    if END_OF_TEXT in known:
        return known[END_OF_TEXT]
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer has neither {END_OF_TEXT} nor an eos token to end documents with")
    return tokenizer.eos_token_id


def tokenizer_sha256(tokenizer: object) -> str:
    """SHA-256 of the parts of a tokenizer that decide the ids of a text.

    Padding, truncation, post-processor and decoder are not included, because neither training nor evaluation uses
    them. So the hash stays the same when a tokenizer is loaded and saved again.
    The vocabulary is hashed as the library serializes it. To parse and sort it takes half a second for Qwen.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    added = {number: token.__getstate__() for number, token in backend.get_added_tokens_decoder().items()}
    digest = hashlib.sha256(json.dumps(added, sort_keys=True).encode())
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
        state = b"none" if part is None else part.__getstate__()
        digest.update(len(state).to_bytes(8, "little") + state)
    return digest.hexdigest()

"""The token cache: a corpus tokenised once, as one flat file that every process maps into memory.

    tokens.bin    all tokens, each document ended by the end-of-text token (uint16 or uint32)
    offsets.npy   (documents + 1) int64, where each document begins
    hashes.npy    (documents) uint64 of the text, which decide the validation split
    meta.json     counts and settings, written last

A cache is keyed by data, column, tokenizer and size, not by sequence length or split. It is built in a
temporary directory under a lock and renamed, so that it is whole or absent.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flare.data.rows import BadRow, Row, Source
from flare.errors import ConfigError, DataError, EnvError
from flare.logs import log

FORMAT_VERSION = 1
BATCH_CHARACTERS = 2_000_000
"""Text tokenised at once: enough to keep all cores busy, little enough to keep memory flat."""
REPORTED_BAD_ROWS = 5
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class TokenSettings:
    """What besides data and tokenizer decides the content of a cache."""

    dataset_size: int | None = None
    max_bad_rows: float = 0.001


class TokenCache:
    """A finished cache, memory-mapped read-only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.tokens = np.memmap(directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        self.offsets = np.load(directory / "offsets.npy")
        self.hashes = np.load(directory / "hashes.npy")

    @property
    def is_whole(self) -> bool:
        """Whether the files are as long as meta.json says (a power loss may cut what was not synced)."""
        meta = self.meta
        sizes = (len(self.tokens), int(self.offsets[-1]), len(self.hashes))
        return sizes == (meta["num_tokens"], meta["num_tokens"], meta["num_documents"])

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def end_of_text_id(self) -> int:
        return self.meta["end_of_text_id"]


def default_cache_dir(cache_dir: str | None) -> Path:
    """Where token caches live: ``--cache_dir``, or ~/.cache/flare."""
    return Path(cache_dir) if cache_dir else Path.home() / ".cache" / "flare"


def end_of_text_id(tokenizer: object) -> int:
    """The token that ends a document: the base model's own <|endoftext|>, else its end-of-sequence token.

    Raises: DataError when the tokenizer has neither.
    """
    known = tokenizer.get_vocab()
    if END_OF_TEXT in known:
        return known[END_OF_TEXT]
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer has neither {END_OF_TEXT} nor an eos token to end documents with")
    return tokenizer.eos_token_id


def tokenizer_sha256(tokenizer: object) -> str:
    """SHA-256 of what turns text into ids, not of the path that the tokenizer was loaded from.

    Left out are padding and truncation (a state, not the tokenizer) and post-processor and decoder, which
    neither training nor evaluation uses. So a tokenizer that was loaded and saved again keeps its hash.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        for part in ("padding", "truncation", "post_processor", "decoder"):
            content.pop(part, None)
    else:  # a tokenizer in Python
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def text_hash(text: str) -> int:
    """64 bits of a document's text, which decide the side of the split that it is on."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def build_token_cache(source: Source, tokenizer: object, cache_dir: Path, settings: TokenSettings) -> TokenCache:
    """Open the cache of this corpus and tokenizer; build it first when it is missing.

    One process builds, others wait on the lock and then find it. Call before the process group starts:
    a long build would run into its timeout.

    Raises: DataError for too many bad rows or no usable document; EnvError when the disk is full.
    """
    key = {
        "format": FORMAT_VERSION,
        "data": source.fingerprint(),
        "tokenizer": tokenizer_sha256(tokenizer),
        "dataset_size": settings.dataset_size,
    }
    fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    directory = cache_dir / f"tokens-{fingerprint}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--cache_dir {cache_dir} cannot be made: {error.strerror}") from error
    with open(cache_dir / f".tokens-{fingerprint}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_built(directory):
            _build(source, tokenizer, directory, key | {"fingerprint": fingerprint}, settings)
    cache = TokenCache(directory)
    _check_bad_rows(cache.meta["bad_rows"], cache.meta["num_documents"], cache.meta["first_bad_rows"], settings)
    return cache


def _is_built(directory: Path) -> bool:
    """Whether a whole cache is there; what is left of a damaged one is removed."""
    try:
        if TokenCache(directory).is_whole:
            return True
    except FileNotFoundError:
        if not directory.exists():
            return False
    except (OSError, ValueError, KeyError):
        pass
    log.warning(f"the token cache {directory} is damaged and built again")
    shutil.rmtree(directory, ignore_errors=True)
    return False


def _build(source: Source, tokenizer: object, directory: Path, key: dict, settings: TokenSettings) -> None:
    part = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        meta = _write_tokens(source, tokenizer, part, settings)
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        with open(part / "meta.json", "w", encoding="utf-8") as file:
            json.dump(key | meta, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, directory)
    except OSError as error:
        raise EnvError(f"cannot write the token cache {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_tokens(source: Source, tokenizer: object, part: Path, settings: TokenSettings) -> dict:
    """Tokenise all usable rows into ``part``; returns the counts for meta.json."""
    end_id = end_of_text_id(tokenizer)
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    lengths: list[int] = []
    hashes: list[int] = []
    bad = BadRows()
    t0 = time.perf_counter()
    rows = islice(source.rows(), settings.dataset_size)
    bar = tqdm(unit=" tokens", unit_scale=True, desc="tokenising", disable=None, leave=False)
    with open(part / "tokens.bin", "wb") as out, bar:
        for texts in _batches(usable_texts(rows, bad)):
            for text, ids in zip(texts, _encode(tokenizer, texts), strict=True):
                out.write(np.asarray([*ids, end_id], dtype=dtype).tobytes())
                lengths.append(len(ids) + 1)
                hashes.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
                bar.update(len(ids) + 1)
    _check_bad_rows(bad.count, len(lengths), bad.first, settings)
    if not lengths:
        raise DataError(f"the data holds no usable document ({bad.count} rows without text)")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    np.save(part / "offsets.npy", offsets)
    np.save(part / "hashes.npy", np.array(hashes, dtype=np.uint64))
    seconds = time.perf_counter() - t0
    log.info(f"tokenised {len(lengths):,} documents, {offsets[-1]:,} tokens in {seconds:.1f} s")
    return {
        "dtype": dtype.name,
        "num_documents": len(lengths),
        "num_tokens": int(offsets[-1]),
        "bad_rows": bad.count,
        "first_bad_rows": bad.first,
        "end_of_text_id": end_id,
        "end_of_text": tokenizer.convert_ids_to_tokens(end_id),
    }


class BadRows:
    """Count of rows without usable text, and the first few with their place."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, row: Row, reason: str) -> None:
        self.count += 1
        if len(self.first) < REPORTED_BAD_ROWS:
            self.first.append(f"{row.where} {reason}")


def usable_texts(rows: Iterator[Row], bad: BadRows) -> Iterator[str]:
    """The rows that hold text; the others are counted in ``bad``."""
    for row in rows:
        reason = _why_unusable(row.value)
        if reason is None:
            yield row.value
        else:
            bad.add(row, reason)


def _why_unusable(value: object) -> str | None:
    if isinstance(value, BadRow):
        return value.reason
    if value is None:
        return "is null"
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    return None


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: object, texts: list[str]) -> list[list[int]]:
    if getattr(tokenizer, "is_fast", False):
        # The Rust tokenizer spreads a batch over all cores by itself.
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def _check_bad_rows(bad: int, good: int, first: list[str], settings: TokenSettings) -> None:
    if bad == 0:
        return
    share = bad / (bad + good)
    shown = "; ".join(first[:2])
    if share > settings.max_bad_rows:
        raise DataError(
            f"{bad} of {bad + good} rows hold no usable text ({shown}); limit is {settings.max_bad_rows:.2%}, "
            "see --max_bad_rows"
        )
    log.warning(f"{bad} of {bad + good} rows hold no usable text and were left out: {shown}")

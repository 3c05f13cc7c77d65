"""The token cache: a corpus that is tokenised once and memory-mapped by every process.

    tokens.bin    all tokens; each document ends with the end-of-text token (uint16 or uint32)
    offsets.npy   (documents + 1) int64: the index of the first token of each document
    hashes.npy    (documents) uint64: hashes of the texts, which decide the validation split
    meta.json     counts and settings, written last

This module opens finished caches; ``flare.data.token_cache.build`` builds them.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flare.logs import log

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenSettings:
    """Settings of a build. ``dataset_size`` changes the content of the cache.

    ``max_bad_rows``: maximum fraction of bad rows. ``num_workers``: CPU cores to use, None for all; the result does
    not depend on it.
    """

    dataset_size: int | None = None
    max_bad_rows: float = 0.001
    num_workers: int | None = None


def cache_key(data: str, tokenizer_sha256: str, settings: TokenSettings, **more: object) -> dict:
    """The inputs of a cache, for its meta.json, and their ``fingerprint``, which is part of the directory name.

    Args:
        data: fingerprint of the rows.
        more: other inputs of this kind of cache, such as its ``format``.
    """
    key = {
        "format": FORMAT_VERSION,
        "data": data,
        "tokenizer": tokenizer_sha256,
        "dataset_size": settings.dataset_size,
        **more,
    }
    return key | {"fingerprint": hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}


class TokenCache:
    """A finished cache, memory-mapped read-only.

    Raises: OSError, ValueError or KeyError when it does not exist or is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.tokens = np.memmap(directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        self.offsets = np.load(directory / "offsets.npy", mmap_mode="r")
        self.hashes = np.load(directory / "hashes.npy", mmap_mode="r")

    @property
    def is_complete(self) -> bool:
        """Whether the files have the sizes in meta.json. After a power failure they may be truncated."""
        meta = self.meta
        sizes = (len(self.tokens), int(self.offsets[-1]), len(self.hashes))
        return sizes == (meta["num_tokens"], meta["num_tokens"], meta["num_documents"])

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def end_of_text_id(self) -> int:
        return self.meta["end_of_text_id"]


def open_complete(directory: Path) -> TokenCache | None:
    """The cache if it exists and is complete, else None."""
    try:
        cache = TokenCache(directory)
        return cache if cache.is_complete else None
    except (OSError, ValueError, KeyError):
        return None


def remove_damaged(directory: Path) -> None:
    """Remove an incomplete cache, if one exists. The caller must hold the lock."""
    if directory.exists():
        log.warning(f"the token cache {directory} is damaged and is built again")
        shutil.rmtree(directory, ignore_errors=True)

"""The token cache: a corpus tokenised once, as one flat file that every process maps into memory.

    tokens.bin    all tokens, each document ended by the end-of-text token (uint16 or uint32)
    offsets.npy   (documents + 1) int64, where each document begins
    hashes.npy    (documents) uint64 of the text, which decide the validation split
    meta.json     counts and settings, written last

This module opens what is finished; ``flare.data.token_cache.build`` makes it.
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
    """What besides data and tokenizer decides the content of a cache, and how many cores may make it.

    ``num_workers``: cores to use; None is all. It changes no byte of the result.
    """

    dataset_size: int | None = None
    max_bad_rows: float = 0.001
    num_workers: int | None = None


def cache_key(data: str, tokenizer_sha256: str, settings: TokenSettings, **more: object) -> dict:
    """What a cache is made of, for its meta.json, and the ``fingerprint`` of all that, which names it.

    Args:
        data: identity of the rows. more: what else decides the content of this kind of cache; its ``format``.
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

    Raises: OSError, ValueError or KeyError when it is not there or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.tokens = np.memmap(directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")
        self.offsets = np.load(directory / "offsets.npy", mmap_mode="r")
        self.hashes = np.load(directory / "hashes.npy", mmap_mode="r")

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


def open_whole(directory: Path) -> TokenCache | None:
    """The cache, if it is there and whole."""
    try:
        cache = TokenCache(directory)
        return cache if cache.is_whole else None
    except (OSError, ValueError, KeyError):
        return None


def remove_damaged(directory: Path) -> None:
    """Make room for a cache that is not whole, if there is something. The caller holds the lock."""
    if directory.exists():
        log.warning(f"the token cache {directory} is damaged and built again")
        shutil.rmtree(directory, ignore_errors=True)

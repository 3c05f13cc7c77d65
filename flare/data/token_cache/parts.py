"""A part: the tokens of one piece of a corpus, in a directory that appears atomically.

    tokens.bin    the tokens of the piece's documents     lengths.npy  tokens of each document, int64
    meta.json     counts, bad rows, BLAKE2 of the others  hashes.npy   64-bit hash of each text, uint64

Parts stay on disk when a build is killed. The next build checks their hashes and reuses them.
"""

import hashlib
import json
import os
import shutil
from array import array
from bisect import bisect_left
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np

from flare.data.sources.base import Piece, read_rows
from flare.data.sources.documents import BadRows, text_hash, usable_texts
from flare.data.token_cache.encode import Encoder, batches

FILES = ("tokens.bin", "lengths.npy", "hashes.npy")


class Part:
    """A finished part, or its first ``limit`` rows.

    Raises: OSError, ValueError or KeyError when it does not exist or its meta.json is damaged.
    """

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory = directory
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        self.digest = meta["blake2b"]
        self.num_rows, self.num_documents = meta["num_rows"], meta["num_documents"]
        self.num_tokens = meta["num_tokens"]
        bad_at = meta["bad_rows_at"]
        if limit is not None and limit < self.num_rows:
            bad_at = bad_at[: bisect_left(bad_at, limit)]
            self.num_rows, self.num_documents = limit, limit - len(bad_at)
            self.num_tokens = int(self.lengths().sum())
        self.bad = BadRows(len(bad_at), meta["first_bad_rows"][: len(bad_at)])

    @classmethod
    def checked(cls, directory: Path) -> "Part | None":
        """The part if it is complete and its hash is correct, else None."""
        try:
            part = cls(directory)
            return part if part.digest == _digest(directory) else None
        except (OSError, ValueError, KeyError):
            return None

    @property
    def tokens_file(self) -> Path:
        return self.directory / "tokens.bin"

    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents) int64."""
        return np.load(self.directory / "lengths.npy")[: self.num_documents]

    def hashes(self) -> np.ndarray:
        """A 64-bit hash of each document's text, (documents) uint64."""
        return np.load(self.directory / "hashes.npy")[: self.num_documents]


def write_part(
    piece: Piece, encoder: Encoder, directory: Path, limit: int | None, report: Callable[[int, int], None]
) -> Part:
    """Tokenise the first ``limit`` rows of a piece into a part.

    Args:
        report: called after each batch with its number of tokens and characters.
    """
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    bad, bad_at = BadRows(), []
    lengths, hashes = array("q"), array("Q")
    with open(temporary / "tokens.bin", "wb") as out:
        for texts in batches(usable_texts(islice(read_rows(piece), limit), bad, bad_at)):
            before = out.tell()
            for text, ids in zip(texts, encoder.encode(texts), strict=True):
                out.write(ids.tobytes())
                lengths.append(len(ids))
                hashes.append(text_hash(text))
            report((out.tell() - before) // encoder.dtype.itemsize, sum(map(len, texts)))
    np.save(temporary / "lengths.npy", np.frombuffer(lengths, dtype=np.int64))
    np.save(temporary / "hashes.npy", np.frombuffer(hashes, dtype=np.uint64))
    meta = {
        "num_rows": len(lengths) + bad.count,
        "num_documents": len(lengths),
        "num_tokens": sum(lengths),
        "bad_rows_at": bad_at,
        "first_bad_rows": bad.first,
        "blake2b": _digest(temporary),
    }
    (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)  # a damaged one
    temporary.rename(directory)
    return Part(directory)


def _digest(directory: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in FILES:
        with open(directory / name, "rb") as file:
            digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()

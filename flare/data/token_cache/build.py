"""Build a token cache: pieces of the corpus are tokenised into parts by several processes, then joined in order.

The parts lie in a work directory of their own, named by the cache's fingerprint. A builder that was killed leaves
its finished parts there, and the next one takes over those whose bytes are right. The cache itself is joined in a
temporary directory and renamed, so that it is whole or absent. Neither the number of workers nor a kill changes
a byte of it.
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flare.data.cache_dir import make_cache_dir
from flare.data.sources.base import OTHER_CACHE_DIR, Piece, Source
from flare.data.sources.documents import BadRows
from flare.data.token_cache.cache import TokenCache, TokenSettings, cache_key, open_whole, remove_damaged
from flare.data.token_cache.encode import Encoder, tokenizer_sha256
from flare.data.token_cache.parts import Part
from flare.data.token_cache.pool import Task, run_tasks
from flare.data.token_cache.progress_bar import TokenProgress
from flare.errors import DataError, EnvError
from flare.files import write_json
from flare.logs import log

JUDGED_ROWS = 10_000
"""Of a corpus without a known end the first so many rows are judged together: a few bad ones at its beginning say
little of the rest. What is too many for all of them is too many at once."""


def build_token_cache(source: Source, tokenizer: object, cache_dir: Path, settings: TokenSettings) -> TokenCache:
    """Open the cache of this corpus and tokenizer; build it first when it is missing.

    A finished one is only read: it may lie where this user cannot write. Call before the process group starts: a long
    build would run into its timeout.

    Raises: DataError for too many bad rows or no usable document; ConfigError or EnvError when the directory cannot
    be made or written, or the disk is full.
    """
    key = cache_key(source.fingerprint(), tokenizer_sha256(tokenizer), settings)
    directory = cache_dir / f"tokens-{key['fingerprint']}"
    cache = open_whole(directory)
    if cache is None:
        make_cache_dir(cache_dir)
        try:
            with build_lock(directory):
                cache = open_whole(directory)
                if cache is None:
                    remove_damaged(directory)
                    Builder(source, tokenizer, directory, settings).build(key)
                    cache = TokenCache(directory)
        except OSError as error:
            raise EnvError(
                f"cannot write the token cache {directory}: {error.strerror or error}; {OTHER_CACHE_DIR}"
            ) from error
    meta = cache.meta
    check_bad_rows(BadRows(meta["bad_rows"], meta["first_bad_rows"]), meta["num_documents"], settings.max_bad_rows)
    return cache


@contextmanager
def build_lock(directory: Path) -> Iterator[None]:
    """One process builds; the others wait, and then find what it has built."""
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waits for another process that makes the token cache {directory}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Builder:
    """One build of one cache. The caller holds the lock."""

    def __init__(self, source: Source, tokenizer: object, directory: Path, settings: TokenSettings) -> None:
        self.pieces = source.pieces()
        self.tokenizer = tokenizer
        self.encoder = Encoder.of(tokenizer)
        self.directory = directory
        self.settings = settings
        # the number tells cuts apart: parts of other pieces, of another version of ours, are not taken over
        self.work = directory.with_name(f".{directory.name}.{len(self.pieces)}.parts")
        self.ledger = Ledger(len(self.pieces), settings.dataset_size)

    def build(self, key: dict) -> None:
        """Make the missing parts, join all and rename."""
        t0 = time.perf_counter()
        self.take_over()
        self._make_parts()
        parts = self._parts()
        meta = self._describe(parts)
        temporary = self.directory.with_name(f".{self.directory.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        join_parts(parts, temporary, self.encoder.dtype.itemsize)
        write_json(temporary / "meta.json", key | meta)
        temporary.rename(self.directory)
        for work in self.work.parent.glob(f".{self.directory.name}.*parts"):
            shutil.rmtree(work)
        seconds = time.perf_counter() - t0
        log.info(f"tokenised {meta['num_documents']:,} documents, {meta['num_tokens']:,} tokens in {seconds:.1f} s")

    def take_over(self) -> None:
        """Finished parts of a build that was killed."""
        for leftover in self.work.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for index in range(len(self.pieces)):
            if part := Part.checked(self._place(index)):
                self.ledger.finish(index, part.num_rows)
        if done := len(self.ledger.rows):
            log.info(f"takes over {done} of {len(self.pieces)} parts that an earlier start has finished")

    def _make_parts(self) -> None:
        processes, threads = workers_for(self.pieces, self.encoder, self.settings.num_workers)
        sizes = [piece.expected_bytes for piece in self.pieces]
        with TokenProgress(sizes, self.ledger.rows) as progress:
            for index in run_tasks(self._next_task, self.encoder, processes, threads, progress.report):
                self.ledger.finish(index, Part(self._place(index)).num_rows)
                progress.finish(index)
                self._stop_when_hopeless()

    def _next_task(self) -> Task | None:
        chosen = self.ledger.next()
        if chosen is None:
            return None
        index, limit = chosen
        return Task(index, self.pieces[index], self._place(index), limit)

    def _parts(self) -> list[Part]:
        """The parts that are done with all before them, the last one cut to ``--dataset_size``."""
        return [Part(self._place(index), limit) for index, limit in self.ledger.needed()]

    def _place(self, index: int) -> Path:
        return self.work / f"{index:08d}"

    def _stop_when_hopeless(self) -> None:
        """Too many bad rows already, whatever the rows that are still to come: only certain when their number has
        a bound."""
        at_most = self.settings.dataset_size
        if at_most is None:
            return
        bad = total_bad(self._parts())
        if too_many_bad(bad.count, at_most, self.settings.max_bad_rows, at_most):
            check_bad_rows(bad, at_most - bad.count, self.settings.max_bad_rows)

    def _describe(self, parts: list[Part]) -> dict:
        """Counts for meta.json. Raises: DataError for too many bad rows or no document."""
        bad = total_bad(parts)
        documents = sum(part.num_documents for part in parts)
        check_bad_rows(bad, documents, self.settings.max_bad_rows, quiet=True)
        if not documents:
            raise DataError(f"the data holds no usable document ({bad.count} rows without text)")
        end_id = self.encoder.end_id
        return {
            "dtype": self.encoder.dtype.name,
            "num_documents": documents,
            "num_tokens": sum(part.num_tokens for part in parts),
            "bad_rows": bad.count,
            "first_bad_rows": bad.first,
            "end_of_text_id": end_id,
            "end_of_text": self.tokenizer.convert_ids_to_tokens(end_id),
        }


class Ledger:
    """Which pieces are done, and how many rows of each belong to the first ``dataset_size`` rows of the corpus.

    How many rows come before a piece is known only when those before it are done. Till then a piece is done up
    to the most rows that it can give, and not begun when those before it are likely to be enough.
    """

    def __init__(self, num_pieces: int, dataset_size: int | None) -> None:
        self.num_pieces = num_pieces
        self.dataset_size = dataset_size
        self.rows: dict[int, int] = {}
        self.given: set[int] = set()

    def finish(self, index: int, num_rows: int) -> None:
        """A piece is done and gave so many rows."""
        self.rows[index] = num_rows
        self.given.discard(index)

    def next(self) -> tuple[int, int | None] | None:
        """The next piece to do, and its most rows; None when there is nothing to give at the moment."""
        expected = sum(self.rows.values()) / len(self.rows) if self.rows else 0.0
        left, likely_left = self.dataset_size, float(self.dataset_size or 1)
        for index in range(self.num_pieces):
            if likely_left <= 0:
                return None
            if index not in self.rows and index not in self.given:
                self.given.add(index)
                return index, left
            if left is not None:
                left -= self.rows.get(index, 0)
                likely_left -= self.rows.get(index, expected)
        return None

    def needed(self) -> list[tuple[int, int | None]]:
        """(piece, rows to take or None for all) in order, of those that are done with all before them."""
        left, pieces = self.dataset_size, []
        for index in range(self.num_pieces):
            if index not in self.rows or (left is not None and left <= 0):
                break
            pieces.append((index, left))
            if left is not None:
                left -= self.rows[index]
        return pieces


def workers_for(pieces: list[Piece], encoder: Encoder, num_workers: int | None) -> tuple[int, int]:
    """(processes, tokenizer threads of each) for these pieces: together the cores, most of them as processes.

    Processes read and check in parallel, threads only tokenise. One process means: in this one. So a corpus of a
    single piece does not wait for processes to start.
    """
    cores = num_workers or len(os.sched_getaffinity(0))
    processes = min(cores, len(pieces)) if encoder.is_fast else 1
    if processes == 1 and num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    return processes, max(1, cores // max(processes, 1))


def join_parts(parts: list[Part], directory: Path, itemsize: int) -> None:
    """tokens.bin, offsets.npy and hashes.npy of these parts, one after the other, synced to disk."""
    documents = sum(part.num_documents for part in parts)
    offsets = np.lib.format.open_memmap(directory / "offsets.npy", "w+", np.int64, (documents + 1,))
    hashes = np.lib.format.open_memmap(directory / "hashes.npy", "w+", np.uint64, (documents,))
    first, token = 0, 0
    offsets[0] = 0
    with open(directory / "tokens.bin", "wb") as out:
        for part in parts:
            last = first + part.num_documents
            np.cumsum(part.lengths(), out=offsets[first + 1 : last + 1])
            offsets[first + 1 : last + 1] += token
            hashes[first:last] = part.hashes()
            first, token = last, token + part.num_tokens
            with open(part.tokens_file, "rb") as file:
                append_file(file, out, part.num_tokens * itemsize)
    for array in (offsets, hashes):
        array.flush()
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def append_file(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Append the first bytes by the kernel's copy, which shares blocks where it can; else by read and write."""
    try:
        while num_bytes and (copied := os.copy_file_range(source.fileno(), target.fileno(), num_bytes)):
            num_bytes -= copied
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
    while num_bytes and (block := source.read(min(num_bytes, 2**20))):
        target.write(block)
        num_bytes -= len(block)
    target.flush()


def total_bad(parts: list[Part]) -> BadRows:
    """Bad rows of all parts."""
    bad = BadRows()
    for part in parts:
        bad.extend(part.bad)
    return bad


def too_many_bad(bad: int, rows: int, share: float, total_rows: int | None = None) -> bool:
    """Whether so many bad ones among the first rows are too many already.

    Args:
        share: of the rows, that may be bad. total_rows: how many there will be, when that is known.
    """
    return bad > share * (total_rows or max(rows, JUDGED_ROWS))


def check_bad_rows(bad: BadRows, num_good: int, max_bad_rows: float, quiet: bool = False) -> None:
    """Warn of bad rows. Raises: DataError when there are more than ``--max_bad_rows`` allows."""
    if bad.count == 0:
        return
    total = bad.count + num_good
    shown = "; ".join(bad.first[:2])
    if bad.count / total > max_bad_rows:
        hint = "" if num_good else "; what is read must be text in UTF-8, in the column that --text_column names"
        raise DataError(
            f"{bad.count} of {total} rows hold no usable text ({shown}); limit is {max_bad_rows:.2%}, "
            f"see --max_bad_rows{hint}"
        )
    if not quiet:
        log.warning(f"{bad.count} of {total} rows hold no usable text and were left out: {shown}")

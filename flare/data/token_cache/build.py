"""Builds a token cache: several processes tokenise pieces of the corpus into parts, which are then joined in order.

The parts are in a work directory named after the cache's fingerprint. If a build is killed, the next build reuses its
finished parts after checking their hashes. The cache is joined in a temporary directory and renamed, so it appears
atomically. Its bytes do not depend on the number of workers or on interruptions.
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
from flare.data.sources.base import CACHE_DIR_HINT, Piece, Source
from flare.data.sources.documents import BadRows
from flare.data.token_cache.cache import TokenCache, TokenSettings, cache_key, open_complete, remove_damaged
from flare.data.token_cache.encode import Encoder, tokenizer_sha256
from flare.data.token_cache.parts import Part
from flare.data.token_cache.pool import Task, run_tasks
from flare.data.token_cache.progress_bar import TokenProgress
from flare.errors import DataError, EnvError
from flare.files import write_json
from flare.logs import log

MIN_CHECKED_ROWS = 10_000
"""While the size of a corpus is unknown, bad rows are compared with at least this number of rows: a few bad rows at
the beginning say little about the rest."""


def build_token_cache(source: Source, tokenizer: object, cache_dir: Path, settings: TokenSettings) -> TokenCache:
    """Open the cache of this corpus and tokenizer. Build it first if it does not exist.

    A finished cache is only read, so it may be in a read-only directory. Call this before the process group starts,
    because a long build would exceed its timeout.

    Raises: DataError for too many bad rows or no usable document; ConfigError or EnvError when the directory cannot
    be created or written, or the disk is full.
    """
    key = cache_key(source.fingerprint(), tokenizer_sha256(tokenizer), settings)
    directory = cache_dir / f"tokens-{key['fingerprint']}"
    cache = open_complete(directory)
    if cache is None:
        make_cache_dir(cache_dir)
        try:
            with build_lock(directory):
                cache = open_complete(directory)
                if cache is None:
                    remove_damaged(directory)
                    Builder(source, tokenizer, directory, settings).build(key)
                    cache = TokenCache(directory)
        except OSError as error:
            raise EnvError(
                f"cannot write the token cache {directory}: {error.strerror or error}; {CACHE_DIR_HINT}"
            ) from error
    meta = cache.meta
    check_bad_rows(BadRows(meta["bad_rows"], meta["first_bad_rows"]), meta["num_documents"], settings.max_bad_rows)
    return cache


@contextmanager
def build_lock(directory: Path) -> Iterator[None]:
    """Lock a cache directory: one process builds, and the others wait until it has finished."""
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info(f"waits for another process that builds the token cache {directory}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Builder:
    """One build of one cache. The caller must hold the lock."""

    def __init__(self, source: Source, tokenizer: object, directory: Path, settings: TokenSettings) -> None:
        self.pieces = source.pieces()
        self.tokenizer = tokenizer
        self.encoder = Encoder.of(tokenizer)
        self.directory = directory
        self.settings = settings
        # another version of Flare may cut the corpus differently; the number of pieces keeps its parts apart
        self.work = directory.with_name(f".{directory.name}.{len(self.pieces)}.parts")
        self.schedule = PieceSchedule(len(self.pieces), settings.dataset_size)

    def build(self, key: dict) -> None:
        """Tokenise the missing parts, join all parts and rename the result."""
        t0 = time.perf_counter()
        self.find_finished_parts()
        self._tokenise_parts()
        parts = self._needed_parts()
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

    def find_finished_parts(self) -> None:
        """Find the finished parts of a build that was killed."""
        for leftover in self.work.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for index in range(len(self.pieces)):
            if part := Part.checked(self._part_directory(index)):
                self.schedule.finish(index, part.num_rows)
        if done := len(self.schedule.rows):
            log.info(f"reuses {done} of {len(self.pieces)} parts that an earlier start has tokenised")

    def _tokenise_parts(self) -> None:
        processes, threads = workers_for(self.pieces, self.encoder, self.settings.num_workers)
        sizes = [piece.expected_bytes for piece in self.pieces]
        with TokenProgress(sizes, self.schedule.rows) as progress:
            for index in run_tasks(self._next_task, self.encoder, processes, threads, progress.report):
                self.schedule.finish(index, Part(self._part_directory(index)).num_rows)
                progress.finish(index)
                self._stop_if_too_many_bad()

    def _next_task(self) -> Task | None:
        chosen = self.schedule.next()
        if chosen is None:
            return None
        index, limit = chosen
        return Task(index, self.pieces[index], self._part_directory(index), limit)

    def _needed_parts(self) -> list[Part]:
        """The finished parts before the first unfinished one. The last one is cut to ``--dataset_size``."""
        return [Part(self._part_directory(index), limit) for index, limit in self.schedule.needed()]

    def _part_directory(self, index: int) -> Path:
        return self.work / f"{index:08d}"

    def _stop_if_too_many_bad(self) -> None:
        """Raise DataError when there are too many bad rows even if all later rows are good. This needs
        ``--dataset_size``, because otherwise the number of rows is unknown."""
        at_most = self.settings.dataset_size
        if at_most is None:
            return
        bad = total_bad(self._needed_parts())
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


class PieceSchedule:
    """Chooses the next piece, and how many rows of each piece belong to the first ``dataset_size`` rows of the corpus.

    The number of rows before a piece is known only when all pieces before it are finished. Until then a piece is
    tokenised up to the maximum number of rows that can be needed of it. It is not started if the pieces before it are
    expected to have enough rows.
    """

    def __init__(self, num_pieces: int, dataset_size: int | None) -> None:
        self.num_pieces = num_pieces
        self.dataset_size = dataset_size
        self.rows: dict[int, int] = {}
        self.started: set[int] = set()

    def finish(self, index: int, num_rows: int) -> None:
        """Record that a piece is finished and has ``num_rows`` rows."""
        self.rows[index] = num_rows
        self.started.discard(index)

    def next(self) -> tuple[int, int | None] | None:
        """(piece, maximum rows or None for all) of the next piece to start; None if there is none at the moment."""
        expected = sum(self.rows.values()) / len(self.rows) if self.rows else 0.0
        left, likely_left = self.dataset_size, float(self.dataset_size or 1)
        for index in range(self.num_pieces):
            if likely_left <= 0:
                return None
            if index not in self.rows and index not in self.started:
                self.started.add(index)
                return index, left
            if left is not None:
                left -= self.rows.get(index, 0)
                likely_left -= self.rows.get(index, expected)
        return None

    def needed(self) -> list[tuple[int, int | None]]:
        """(piece, rows to use or None for all) of the finished pieces before the first unfinished one, in order."""
        left, pieces = self.dataset_size, []
        for index in range(self.num_pieces):
            if index not in self.rows or (left is not None and left <= 0):
                break
            pieces.append((index, left))
            if left is not None:
                left -= self.rows[index]
        return pieces


def workers_for(pieces: list[Piece], encoder: Encoder, num_workers: int | None) -> tuple[int, int]:
    """(processes, tokenizer threads per process) for these pieces. Together they use all cores.

    Processes are preferred: they also read and check in parallel, but threads only tokenise. One process means this
    process, so a corpus with a single piece does not wait for a worker to start.
    """
    cores = num_workers or len(os.sched_getaffinity(0))
    processes = min(cores, len(pieces)) if encoder.is_fast else 1
    if processes == 1 and num_workers:
        os.environ["RAYON_NUM_THREADS"] = str(num_workers)
    return processes, max(1, cores // max(processes, 1))


def join_parts(parts: list[Part], directory: Path, itemsize: int) -> None:
    """Write tokens.bin, offsets.npy and hashes.npy of these parts in order, and sync them to disk."""
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
    """Append the first ``num_bytes`` of a file. The kernel copies them, and shares disk blocks where possible."""
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
    """The bad rows of all parts."""
    bad = BadRows()
    for part in parts:
        bad.extend(part.bad)
    return bad


def too_many_bad(bad: int, rows: int, share: float, total_rows: int | None = None) -> bool:
    """Whether there are already too many bad rows among the first ``rows`` rows.

    Args:
        share: maximum fraction of bad rows.
        total_rows: the number of rows of the corpus, if known.
    """
    return bad > share * (total_rows or max(rows, MIN_CHECKED_ROWS))


def check_bad_rows(bad: BadRows, num_good: int, max_bad_rows: float, quiet: bool = False) -> None:
    """Warn of bad rows. Raises: DataError when there are more than ``--max_bad_rows`` allows."""
    if bad.count == 0:
        return
    total = bad.count + num_good
    shown = "; ".join(bad.first[:2])
    if bad.count / total > max_bad_rows:
        hint = "" if num_good else "; the column that --text_column names must have UTF-8 text"
        raise DataError(
            f"{bad.count} of {total} rows hold no usable text ({shown}); limit is {max_bad_rows:.2%}, "
            f"see --max_bad_rows{hint}"
        )
    if not quiet:
        log.warning(f"{bad.count} of {total} rows hold no usable text and are skipped: {shown}")

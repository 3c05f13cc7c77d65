"""Reads local files once for their SHA-256 and for the lines where they can be cut.

The result is kept in the cache directory. The next start reuses it for unchanged files and does not read them.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from flare.data.sources.base import piece_bytes
from flare.files import write_json

FORMAT_VERSION = 3
"""Version of the stored notes and of the rule for cutting files."""
BLOCK_BYTES = 4 * 2**20
SETTLED_SEC = 3.0
"""A file that was changed more recently may change again without a new timestamp, because timestamps are coarse."""


@dataclass(frozen=True)
class FileFacts:
    """``cuts``: (byte, number of the line that begins there) pairs, about ``piece_bytes(size)`` apart."""

    size: int
    sha256: str
    cuts: tuple[tuple[int, int], ...] = ()


def facts_of(files: list[Path], memo_dir: Path | None, root: Path | None) -> list[FileFacts]:
    """Facts of these files. Files with a valid note from an earlier start in ``memo_dir`` are not read again.

    A note is valid while inode, size, mtime and ctime are the same. The kernel sets ctime at every change, and no tool
    can set it back. The device number is not compared, because hosts number a network disk differently.
    Source: Git's index uses the same rule (racy-git.adoc; USE_STDEV in statinfo.c).

    Args:
        root: the folder or file in which they were found. All files below one root share one list of notes, so a new
            file or another glob reads only the files without a note.
    """
    if memo_dir is None:
        return [read_facts(file) for file in files]
    memo = memo_dir / f".facts-{hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:32]}.json"
    with _locked(memo.with_suffix(".lock")):  # one rank reads, the others wait and use its notes
        known, facts = _read_memo(memo), []
        notes = known.copy()
        for file in files:
            note = notes.pop(name := str(file.absolute()), None)
            if note is None or note["state"] != _state(file):
                note = _note(file)
            facts.append(_from_note(note["facts"]))
            if note["is_settled"]:
                notes[name] = note
        if notes != known:
            notes = {name: note for name, note in notes.items() if os.path.exists(name)}
            with contextlib.suppress(OSError):  # then the next start reads the files again
                write_json(memo, {"format": FORMAT_VERSION, "files": notes})
    return facts


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock. On a file system without locks, continue without one."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _note(file: Path) -> dict:
    """Read a file. ``is_settled``: it did not change shortly before or during the read."""
    begun, state = time.time(), _state(file)
    facts = asdict(read_facts(file))
    is_settled = state[-1] / 1e9 < begun - SETTLED_SEC and _state(file) == state
    return {"state": state, "is_settled": is_settled, "facts": facts}


def _state(file: Path) -> list[int]:
    stat = os.stat(file)
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_memo(memo: Path) -> dict:
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
        notes = content["files"].items() if content["format"] == FORMAT_VERSION else ()
        return {name: note for name, note in notes if note["state"] and _from_note(note["facts"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _from_note(note: dict) -> FileFacts:
    return FileFacts(note["size"], note["sha256"], tuple((byte, line) for byte, line in note["cuts"]))


def read_facts(file: Path) -> FileFacts:
    """Read the complete file once, in blocks of ``BLOCK_BYTES``."""
    digest = hashlib.sha256()
    cuts: list[tuple[int, int]] = []
    every = piece_bytes(file.stat().st_size)
    offset, line, due = 0, 1, every
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            counted = 0  # bytes of the block whose lines are counted
            while due < offset + len(block) and (newline := block.find(b"\n", max(due - offset, 0))) >= 0:
                line += block.count(b"\n", counted, newline + 1)
                counted = newline + 1
                cuts.append((offset + counted, line))
                due = offset + counted + every
            line += block.count(b"\n", counted)
            offset += len(block)
    return FileFacts(offset, digest.hexdigest(), tuple(cut for cut in cuts if cut[0] < offset))

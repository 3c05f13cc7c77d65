"""What one pass over local files tells: their SHA-256, and where lines begin at which they can be cut.

The next start takes it over for files that nobody has touched since, and reads none of them.
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
"""Of the notes, and of how files are cut."""
BLOCK_BYTES = 4 * 2**20
SETTLED_SEC = 3.0
"""A file that was changed less than this before it was read may change again with the same times (they are coarse)."""


@dataclass(frozen=True)
class FileFacts:
    """``cuts``: (byte, number of the line that begins there), about every ``piece_bytes(size)``."""

    size: int
    sha256: str
    cuts: tuple[tuple[int, int], ...] = ()


def facts_of(files: list[Path], memo_dir: Path | None, root: Path | None) -> list[FileFacts]:
    """Facts of these files; what ``memo_dir`` notes of earlier starts is not read again.

    A note holds as long as inode, size and the times of change are the same. The kernel sets ctime at every change,
    and no tool can set it back. The device is no part of it: hosts number a network's disk each in its own way.
    Source: Git's index does it so (racy-git.adoc; USE_STDEV in statinfo.c).

    Args:
        root: the folder or file that they were found by. All that was ever read below it has one list of notes, so
            that a file more, or another glob, costs reading that file.
    """
    if memo_dir is None:
        return [read_facts(file) for file in files]
    memo = memo_dir / f".facts-{hashlib.sha256(str(root.absolute()).encode()).hexdigest()[:32]}.json"
    with _locked(memo.with_suffix(".lock")):  # of several ranks one reads, the others find its notes
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
            with contextlib.suppress(OSError):  # only the next start's time is lost
                write_json(memo, {"format": FORMAT_VERSION, "files": notes})
    return facts


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, where one can be had."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(path, "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _note(file: Path) -> dict:
    """Read a file. ``is_settled``: it was left alone before and while that was done."""
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
    """Read the whole file once, in small blocks."""
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

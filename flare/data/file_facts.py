"""What one pass over local files tells: their SHA-256, and where lines begin at which they can be cut.

The next start takes it over for files that nobody has touched since, and reads none of them.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from flare.data.rows import PIECE_BYTES
from flare.files import write_json

BLOCK_BYTES = 4 * 2**20
SETTLED_SEC = 3.0
"""A file that was changed less than this before it was read may change again with the same times (they are coarse)."""


@dataclass(frozen=True)
class FileFacts:
    """``cuts``: (byte, number of the line that begins there), about every ``PIECE_BYTES``."""

    size: int
    sha256: str
    cuts: tuple[tuple[int, int], ...] = ()


def facts_of(files: list[Path], memo_dir: Path | None) -> list[FileFacts]:
    """Facts of these files; what ``memo_dir`` notes of earlier starts is not read again.

    A note holds as long as device, inode, size and the times of change are the same. The kernel sets ctime at every
    change, and no tool can set it back. Source: Git's index does it so (racy-git.adoc).
    """
    if memo_dir is None:
        return [read_facts(file) for file in files]
    names = [str(file.absolute()) for file in files]
    memo = memo_dir / f"facts-{hashlib.sha256(chr(0).join(names).encode()).hexdigest()[:32]}.json"
    known = _read_memo(memo)
    facts, notes, is_new = [], {}, False
    for file, name in zip(files, names, strict=True):
        now, state = time.time(), _state(file)
        noted = known.get(name)
        if noted is None or noted["state"] != state:
            noted = {"state": state, "facts": asdict(read_facts(file))}
            is_settled = max(state[-2:]) / 1e9 < now - SETTLED_SEC and _state(file) == state
            is_new |= is_settled
        else:
            is_settled = True
        facts.append(_from_note(noted["facts"]))
        if is_settled:
            notes[name] = noted
    if is_new:
        with contextlib.suppress(OSError):  # only the next start's time is lost
            write_json(memo, {"piece_bytes": PIECE_BYTES, "files": notes})
    return facts


def _state(file: Path) -> list[int]:
    stat = os.stat(file)
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read_memo(memo: Path) -> dict:
    try:
        content = json.loads(memo.read_text(encoding="utf-8"))
        return content["files"] if content["piece_bytes"] == PIECE_BYTES else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _from_note(note: dict) -> FileFacts:
    return FileFacts(note["size"], note["sha256"], tuple((byte, line) for byte, line in note["cuts"]))


def read_facts(file: Path) -> FileFacts:
    """Read the whole file once, in small blocks."""
    digest = hashlib.sha256()
    cuts: list[tuple[int, int]] = []
    offset, line, due = 0, 1, PIECE_BYTES
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
            newline = block.find(b"\n", max(due - offset, 0)) if due < offset + len(block) else -1
            if newline >= 0:
                cuts.append((offset + newline + 1, line + block.count(b"\n", 0, newline + 1)))
                due = offset + newline + 1 + PIECE_BYTES
            line += block.count(b"\n")
            offset += len(block)
    return FileFacts(offset, digest.hexdigest(), tuple(cut for cut in cuts if cut[0] < offset))

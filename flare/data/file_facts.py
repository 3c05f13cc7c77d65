"""What one pass over a local file tells: its SHA-256, and where lines begin at which it can be cut."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from flare.data.rows import PIECE_BYTES

BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class FileFacts:
    """``cuts``: (byte, number of the line that begins there), about every ``PIECE_BYTES``."""

    size: int
    sha256: str
    cuts: tuple[tuple[int, int], ...] = ()


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

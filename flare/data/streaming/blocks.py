"""A block: consecutive rows of a stream, in a directory of its own that is whole or absent.

    tokens.bin    rows * T + 1 tokens        starts.npy   where documents begin in them, int64, the first one at 0
    meta.json     first row, number of rows, and the place before and behind it, written last

Its last token is also the next block's first one, since it is the last row's last label.
"""

import json
import shutil
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flare.data.streaming.position import Place


@dataclass
class Block:
    """A finished block, memory-mapped. Rows are read from it as from a token cache: see ``PackedRows``."""

    directory: Path
    end_of_text_id: int

    def __post_init__(self) -> None:
        meta = json.loads((self.directory / "meta.json").read_text(encoding="utf-8"))
        self.place, self.end = Place.from_json(meta["place"]), Place.from_json(meta["end"])
        self.first_row, self.num_rows = self.place.first_row, meta["num_rows"]
        self.epochs: tuple[float, float] = tuple(meta["epochs"])
        self.tokens = np.memmap(self.directory / "tokens.bin", dtype=meta["dtype"], mode="r")
        self.offsets = np.append(np.load(self.directory / "starts.npy"), len(self.tokens))

    @property
    def last_row(self) -> int:
        return self.first_row + self.num_rows


class BlockWriter:
    """Writes one block as tokens come in.

    Args:
        directory: of all blocks. most_rows: it is full with them.
    """

    def __init__(self, directory: Path, place: Place, dtype: np.dtype, seq_len: int, most_rows: int) -> None:
        self.directory = directory / f"{place.block:08d}"
        self.temporary = directory / f".{place.block:08d}.tmp"
        self.place, self.dtype, self.seq_len = place, dtype, seq_len
        self.most_tokens = most_rows * seq_len + 1
        self.num_tokens = 0
        self.starts = array("q", [0])
        self.temporary.mkdir()
        self.file = open(self.temporary / "tokens.bin", "wb")  # noqa: SIM115 (open as long as the block is)

    @property
    def room(self) -> int:
        return self.most_tokens - self.num_tokens

    @property
    def num_rows(self) -> int:
        return max(self.num_tokens - 1, 0) // self.seq_len

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Tokens of the stream, and where documents start in them."""
        assert len(tokens) <= self.room
        self.file.write(tokens.tobytes())
        begin = self.num_tokens
        self.starts.extend((starts + begin)[starts + begin > 0].tolist())
        self.num_tokens += len(tokens)

    def finish(self, end: Place, num_pieces: int) -> None:
        """Make the block, of the full rows, whole and visible; there must be one.

        Args:
            end: the place behind it, from which the next block is made.
        """
        kept = self.num_rows * self.seq_len + 1
        self.file.flush()
        self.file.truncate(kept * self.dtype.itemsize)
        self.file.close()
        starts = np.frombuffer(self.starts, np.int64)
        np.save(self.temporary / "starts.npy", starts[starts < kept])
        meta = {
            "num_rows": self.num_rows,
            "dtype": self.dtype.name,
            "epochs": [self.place.epochs(num_pieces), end.epochs(num_pieces)],
            "place": self.place.to_json(),
            "end": end.to_json(),
        }
        (self.temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        self.temporary.rename(self.directory)

    def discard(self) -> None:
        """Leave nothing of an unfinished block."""
        self.file.close()
        shutil.rmtree(self.temporary)

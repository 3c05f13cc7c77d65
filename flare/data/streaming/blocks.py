"""A block: consecutive rows of a stream, in one directory that is created atomically.

    tokens.bin    rows * T + 1 tokens        starts.npy   where documents begin in them, int64, the first one at 0
    meta.json     first row, number of rows, the place where the block begins and where the next one does

The last token of a block is also the first token of the next one, because it is the label of the last position.
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
    """A finished block, memory-mapped. ``PackedRows`` reads rows from it as from a token cache."""

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
        directory: of all blocks. max_rows: rows of a full block.
    """

    def __init__(self, directory: Path, place: Place, dtype: np.dtype, seq_len: int, max_rows: int) -> None:
        self.directory = directory / f"{place.block:08d}"
        self.temporary = directory / f".{place.block:08d}.tmp"
        self.place, self.dtype, self.seq_len = place, dtype, seq_len
        self.max_tokens = max_rows * seq_len + 1
        self.num_tokens = 0
        self.starts = array("q", [0])
        self.temporary.mkdir()
        self.file = open(self.temporary / "tokens.bin", "wb")  # noqa: SIM115 (open as long as the block is)

    @property
    def free_tokens(self) -> int:
        return self.max_tokens - self.num_tokens

    @property
    def num_rows(self) -> int:
        return max(self.num_tokens - 1, 0) // self.seq_len

    def append(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Append tokens. ``starts``: the indices in them at which documents start."""
        assert len(tokens) <= self.free_tokens
        self.file.write(tokens.tobytes())
        begin = self.num_tokens
        self.starts.extend((starts + begin)[starts + begin > 0].tolist())
        self.num_tokens += len(tokens)

    def finish(self, end: Place, num_pieces: int) -> None:
        """Publish the block with its full rows, at least one. A rename makes it visible atomically.

        Args:
            end: the place where the next block begins.
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
        """Delete an unfinished block."""
        self.file.close()
        shutil.rmtree(self.temporary)

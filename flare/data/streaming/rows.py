"""Training rows of a stream, as a trainer reads them: by position in the run, on every rank.

Rows are shuffled inside a block: position p of the run is a row of the block that holds p, by a permutation of
(seed, block). So the position, the seed and the place of the block determine the row. A checkpoint records that place.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flare.data.order import permutation
from flare.data.packing import PackedRows
from flare.data.streaming.block_store import BlockDirectory, BlockWaiter, ProducerClient
from flare.data.streaming.blocks import Block
from flare.data.streaming.held_out import StreamedCorpus
from flare.data.streaming.messages import MAX_FULL_BLOCKS, ProducerConfig, WorkerConfig
from flare.data.streaming.position import Place
from flare.data.training_rows import Batch, TrainRows
from flare.distributed import process_group
from flare.distributed.process_group import World

KEPT_STEPS = 4
"""Steps before the current one whose rows are kept: a rank prefetches one step, and the CPU of one rank can be two
steps ahead of another rank's. So a block must have the rows of five steps, or kept rows could use all the space."""


@dataclass(frozen=True)
class StreamSettings:
    """How a stream becomes rows.

    ``block_rows``: rows that are shuffled together. ``num_workers``: worker processes at most.
    """

    seq_len: int
    packing: str
    seed: int
    block_rows: int
    cache_dir: Path
    num_workers: int


class OpenBlock:
    """A block with its rows in training order."""

    def __init__(self, block: Block, settings: StreamSettings) -> None:
        self.block = block
        documents = np.arange(len(block.offsets) - 1)
        self.rows = PackedRows(block, documents, settings.seq_len, settings.packing)
        assert len(self.rows) == block.num_rows
        self.order = permutation(settings.seed, block.place.block, block.num_rows)


class StreamedRows(TrainRows):
    """Rows of the run by index, over any number of epochs. Call ``start`` first.

    Rows that later steps do not need are deleted, so positions must not decrease. One thread reads. Another one may
    call ``place_at`` and ``epochs``.
    """

    def __init__(self, corpus: StreamedCorpus, settings: StreamSettings) -> None:
        self.corpus, self.settings = corpus, settings
        self.blocks: list[OpenBlock] = []
        self.next_block = self.step_rows = 0
        self.source: ProducerClient | BlockWaiter | None = None

    def start(self, world: World, recorded: dict | None, step_rows: int) -> None:
        """Start the producer. A collective: all ranks must call it.

        Args:
            recorded: what ``place_at`` returned for the position to resume from; None for a new run.
            step_rows: rows of an optimizer step.
        """
        place = Place.from_json(recorded) if recorded else Place.start(len(self.corpus.pieces))
        self.next_block, self.step_rows = place.block, step_rows
        blocks = BlockDirectory(self.settings.cache_dir) if world.local_rank == 0 else None
        if blocks:
            self.source = ProducerClient(self._producer_config(place, blocks.directory, step_rows), blocks)
        directories = process_group.gather_objects(blocks and str(blocks.directory))
        if not blocks:
            self.source = BlockWaiter(Path(directories[world.rank - world.local_rank]))

    def _producer_config(self, place: Place, directory: Path, step_rows: int) -> ProducerConfig:
        corpus, settings = self.corpus, self.settings
        limits, held_out_below = corpus.limits, corpus.meta["held_out_below"]
        return ProducerConfig(
            worker_config=WorkerConfig(corpus.encoder.to_message(), corpus.pieces, limits, held_out_below),
            place=place,
            directory=directory,
            dtype=corpus.encoder.dtype,
            seed=settings.seed,
            seq_len=settings.seq_len,
            block_rows=settings.block_rows,
            step_rows=step_rows,
            max_bad_rows=corpus.settings.max_bad_rows,
            total_rows=None if None in limits else sum(limits),
            num_workers=settings.num_workers,
        )

    def close(self) -> None:
        """Stop the producer and its workers. The blocks are deleted."""
        if self.source:
            self.source.close()

    # -- order ---------------------------------------------------------------------------------------

    def order(self, _seed: int) -> "StreamedRows":
        """These rows know their own order, because blocks become known one by one."""
        return self

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last), at most a block's rows.

        Rows more than ``KEPT_STEPS`` steps before ``first`` are deleted.
        """
        assert last - first <= self.settings.block_rows  # more might not fit on disk
        self._drop_blocks_below(first - KEPT_STEPS * self.step_rows)
        while not self.blocks or self.blocks[-1].block.last_row < last:
            self._open_next()
        found = []
        for opened in self.blocks:
            begin = opened.block.first_row
            low, high = max(first - begin, 0), min(last, opened.block.last_row) - begin
            found.append(begin + opened.order[low : max(high, low)])
        return np.concatenate(found)

    def _open_next(self) -> None:
        self.source.wait_for(self.next_block)
        block = Block(self.source.directory / f"{self.next_block:08d}", self.corpus.end_of_text_id)
        self.blocks.append(OpenBlock(block, self.settings))
        self.next_block += 1

    def _drop_blocks_below(self, position: int) -> None:
        kept = [opened for opened in self.blocks if opened.block.last_row > position]
        if len(kept) < len(self.blocks):
            self.blocks = kept
            self.source.discard_below(kept[0].block.place.block if kept else self.next_block)

    # -- rows ----------------------------------------------------------------------------------------

    def num_targets(self, rows: np.ndarray) -> int:
        """Targets in these rows, without reading them."""
        return sum(opened.rows.num_targets(inside) for opened, inside in self._by_block(rows))

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of rows that ``rows`` returned, in its order."""
        parts = [opened.rows.batch(inside) for opened, inside in self._by_block(rows)]
        return Batch(
            np.concatenate([part.input_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.position_ids for part in parts]),
        )

    def any_row(self) -> int:
        """The index of a row that can be read at the moment."""
        return self.blocks[-1].block.first_row

    def _by_block(self, rows: np.ndarray) -> Iterator[tuple[OpenBlock, np.ndarray]]:
        """Each block, with the indices in it of those rows that it has. ``rows`` must be in the order of blocks."""
        for opened in self.blocks:
            block = opened.block
            inside = rows[(rows >= block.first_row) & (rows < block.last_row)]
            if len(inside):
                yield opened, inside - block.first_row

    def _block_of(self, row: int) -> Block:
        return next(o.block for o in self.blocks if o.block.first_row <= row < o.block.last_row)

    # -- progress --------------------------------------------------------------------------------------

    def place_at(self, position: int) -> dict:
        """What a checkpoint records, for ``start`` to resume from. The row before the position must have been read."""
        if position == 0:
            return Place.start(len(self.corpus.pieces)).to_json()
        block = self._block_of(position - 1)
        return (block.end if position == block.last_row else block.place).to_json()

    def epochs(self, position: int) -> float:
        """Passes over the data up to a position."""
        if position == 0:
            return 0.0
        block = self._block_of(position - 1)
        begin, end = block.epochs
        return begin + (end - begin) * (position - block.first_row) / block.num_rows

    def describe(self) -> str:
        """For the log."""
        settings = self.settings
        size = MAX_FULL_BLOCKS * settings.block_rows * settings.seq_len * self.corpus.encoder.dtype.itemsize
        return (
            f"streamed from {len(self.corpus.pieces):,} pieces, {settings.block_rows:,} rows shuffled at a time, at "
            f"most {size / 2**20:,.0f} MiB of tokens on disk"
        )

"""The process that makes blocks ahead of the training: ``python -m flare.data.streaming.producer FD PARENT``.

One a host, started by its first rank. It owns the tokenising workers and the window: it makes the next block as long
as the rows on disk leave room, and deletes the blocks that the training has left behind. It imports no torch.
"""

import contextlib
import os
import shutil
import sys
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from flare.child_process import Child, ignore_stop_signals
from flare.data.sources.base import OTHER_CACHE_DIR
from flare.data.sources.documents import BadRows
from flare.data.streaming.blocks import BlockWriter
from flare.data.streaming.lanes import Item, Lane
from flare.data.streaming.messages import WINDOW_BLOCKS, Order, Segment
from flare.data.streaming.position import Cursor, Place
from flare.data.token_cache.build import check_bad_rows, too_many_bad
from flare.errors import DataError, EnvError, FlareError

MOST_BLOCKS = 8
"""Blocks on disk at most when they are short: a small corpus is not tokenised far ahead for nothing. The rows of the
steps that are kept may lie in seven."""
PARENT_CHECK_SEC = 5.0


class Merge:
    """The lanes' segments in turn, cut into blocks."""

    def __init__(self, order: Order, lanes: list[Lane]) -> None:
        self.order, self.lanes = order, lanes
        self.place = order.place
        self._count_from(order.place)
        self.seen_rows, self.seen_bad = 0, BadRows()  # since this process started, for the log
        self.turn, self.offset = order.place.turn, order.place.skip
        self.writer: BlockWriter | None = None
        self.num_pieces = len(order.job.pieces)

    def _count_from(self, place: Place) -> None:
        self.rows, self.tokens = place.epoch_rows, place.epoch_tokens
        self.rows_read, self.bad = place.rows_read, place.bad

    def step(self, may_begin: bool) -> bool:
        """Use tokens of the lane whose turn it is, up to the end of its segment or of the block.

        Args:
            may_begin: whether the window has room for another block.
        Returns whether anything could be done.
        Raises: DataError for an epoch that is too short or has too many bad rows.
        """
        lane = self.lanes[self.turn]
        if not lane.queue or (self.writer is None and not may_begin):
            return False
        if self.writer is None:
            order = self.order
            self.writer = BlockWriter(order.directory, self.place, order.dtype, order.seq_len, order.block_rows)
        item = lane.queue[0]
        if item.tokens is not None:
            self._append(item)
            if self.writer.room == 0:
                self._finish_block(self.place_here())
                return True
            if self.offset < len(item.tokens):
                return True
        self._use_up(lane, item)
        return True

    def _append(self, item: Item) -> None:
        end = min(len(item.tokens), self.offset + self.writer.room)
        inside = item.starts[(item.starts >= self.offset) & (item.starts < end)]
        self.writer.append(item.tokens[self.offset : end], inside - self.offset)
        self.offset = end

    def _use_up(self, lane: Lane, item: Item) -> None:
        """The item is behind us: count its rows, and on to the next lane or epoch."""
        lane.queue.popleft()
        lane.used = item.end
        self.offset = 0
        self.rows_read += item.rows
        self.bad.extend(item.bad)
        self.seen_rows += item.rows
        self.seen_bad.extend(item.bad)
        self._judge(is_whole=False)
        waiting = [n for n in range(len(self.lanes)) if self.lanes[n].used is not None]
        if not waiting:
            self._finish_epoch()
        else:
            self.turn = next((n for n in waiting if n > self.turn), waiting[0])

    def place_here(self) -> Place:
        """The place of the next block's first token: the last one that went into this block."""
        return Place(
            cursors=tuple(lane.used for lane in self.lanes),
            block=self.place.block + 1,
            first_row=self.place.first_row + self.writer.num_rows,
            epoch=self.place.epoch,
            epoch_rows=self.rows + self.writer.num_rows,
            epoch_tokens=self.tokens + self.writer.num_tokens - 1,
            turn=self.turn,
            skip=self.offset - 1,
            rows_read=self.rows_read,
            bad_rows=self.bad.count,
            first_bad_rows=tuple(self.bad.first),
        )

    def _finish_block(self, end: Place) -> None:
        self.writer.finish(end, self.num_pieces)
        self.writer, self.place = None, end
        self._count_from(end)
        self.turn, self.offset = end.turn, end.skip

    def _finish_epoch(self) -> None:
        """Cut the block here; tokens that fill no row are left out, as at the end of a token cache."""
        self._judge(is_whole=True)
        rows, tokens = self.rows + self.writer.num_rows, self.tokens + self.writer.num_tokens
        if rows < self.order.step_rows:
            raise DataError(
                f"the data gives {tokens:,} training tokens in an epoch, one step needs "
                f"{self.order.step_rows * self.order.seq_len + 1:,}; lower --max_seq_length or the batch size"
            )
        made = self.writer.num_rows
        for lane in self.lanes:
            lane.used = Cursor()
        begin = Place.start(self.num_pieces)
        end = replace(begin, block=self.place.block, first_row=self.place.first_row, epoch=self.place.epoch + 1)
        if made:
            self._finish_block(replace(end, block=end.block + 1, first_row=end.first_row + made))
        else:
            self.writer.discard()
            self.writer, self.place = None, end
            self._count_from(end)
            self.turn, self.offset = 0, 0

    def _judge(self, is_whole: bool) -> None:
        """Raises: DataError when the bad rows are too many: of the whole epoch, of what ``--dataset_size`` says
        that it will be, or of the rows so far."""
        share, total = self.order.max_bad_rows, self.order.total_rows
        rows = self.rows_read if is_whole or total is None else total
        if is_whole or too_many_bad(self.bad.count, rows, share, total):
            check_bad_rows(self.bad, rows - self.bad.count, share, quiet=True)


class Worker(Child):
    """A tokenising process and whether it was asked for something."""

    def __init__(self) -> None:
        super().__init__("flare.data.streaming.worker")
        self.is_busy = False

    def ask(self, question: tuple[int, int, int]) -> None:
        """Send a question; it answers one at a time."""
        self.send(question)
        self.is_busy = True

    def answer(self) -> tuple[int, Segment]:
        """(lane, segment). Raises: what the reader raised; EnvError when the process died."""
        try:
            lane, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise EnvError(
                f"a tokenising worker {self.describe_exit()}; the last checkpoint is good, the same command goes on "
                "from there; --preprocessing_num_workers N takes fewer workers"
            ) from None
        self.is_busy = False
        if lane is None:
            raise answer
        return lane, answer

    def end(self) -> None:
        """Whatever it does."""
        self.process.kill()
        self.process.wait()


class Producer:
    """Workers, lanes and blocks of one host, until the rank that asked for them closes its pipe."""

    def __init__(self, pipe: Connection, order: Order, parent: int) -> None:
        self.pipe, self.order, self.parent = pipe, order, parent
        pieces = len(order.job.pieces)
        self.lanes = [Lane(n, order.seed, pieces, order.place) for n in range(len(order.place.cursors))]
        self.merge = Merge(order, self.lanes)
        self.workers: list[Worker] = []
        self.oldest = order.place.block
        self.sizes: dict[int, int] = {}

    def run(self) -> None:
        """Make blocks until there is no one left to read them. Raises: what readers raise; EnvError, DataError."""
        count = max(1, min(self.order.num_workers, len(self.lanes)))
        self.workers = [Worker() for _ in range(count)]
        for worker in self.workers:
            worker.send(self.order.job)
        while True:
            self._make_blocks()
            self._ask()
            self._check_parent()
            busy = {worker.pipe: worker for worker in self.workers if worker.is_busy}
            for pipe in wait([self.pipe, *busy], PARENT_CHECK_SEC):
                if pipe is self.pipe:
                    self._discard_below(self.pipe.recv())
                else:
                    lane, segment = busy[pipe].answer()
                    self.lanes[lane].answered(segment)

    def _check_parent(self) -> None:
        """A pipe stays open when a fork of its owner outlives it. Raises: EOFError when the owner is gone."""
        if os.getppid() != self.parent:
            raise EOFError

    def _make_blocks(self) -> None:
        before = self.merge.place
        while self.merge.step(self._has_room()):
            if self.merge.place.block > before.block:
                self.sizes[before.block] = self.merge.place.first_row - before.first_row
                self.pipe.send(("block", before.block, self.merge.seen_rows, self.merge.seen_bad))
            before = self.merge.place

    def _has_room(self) -> bool:
        kept = sum(self.sizes.values())
        return kept <= (WINDOW_BLOCKS - 1) * self.order.block_rows and len(self.sizes) < MOST_BLOCKS

    def _ask(self) -> None:
        """A question for each idle worker, about a lane of its own: it has that lane's piece open."""
        for number, worker in enumerate(self.workers):
            mine = self.lanes[number :: len(self.workers)]
            if not worker.is_busy and (wanting := [lane for lane in mine if lane.wants_more]):
                behind = len(self.lanes)
                soonest = min(wanting, key=lambda ln: (len(ln.queue), (ln.number - self.merge.turn) % behind))
                worker.ask(soonest.question())

    def _discard_below(self, block: int | None) -> None:
        if block is None:  # the training has ended
            raise EOFError
        for number in range(self.oldest, block):
            shutil.rmtree(self.order.directory / f"{number:08d}", ignore_errors=True)
            self.sizes.pop(number, None)
        self.oldest = max(self.oldest, block)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.end()

    def clear(self) -> None:
        """Take the window off the disk. Not after an error: what was announced before it may still be read."""
        shutil.rmtree(self.order.directory, ignore_errors=True)


def main() -> int:
    ignore_stop_signals()
    pipe = Connection(int(sys.argv[1]))
    producer = Producer(pipe, pipe.recv(), int(sys.argv[2]))
    try:
        producer.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the training has ended
        producer.clear()
        return 0
    except OSError as error:
        failure = EnvError(f"cannot write to {producer.order.directory}: {error.strerror or error}; {OTHER_CACHE_DIR}")
    except FlareError as error:
        failure = error
    finally:
        producer.close()
    with contextlib.suppress(OSError):
        pipe.send(("error", failure))
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())

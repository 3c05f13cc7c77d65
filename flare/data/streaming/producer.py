"""The process that makes blocks ahead of the training: ``python -m flare.data.streaming.producer FD PARENT``.

Each host has one producer, which its first rank starts. The producer starts the workers and writes blocks while there
is space for them. It deletes blocks that all ranks of the host have read. It does not import torch.
"""

import contextlib
import os
import shutil
import sys
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from flare.child_process import Child, ignore_stop_signals
from flare.data.sources.base import CACHE_DIR_HINT
from flare.data.sources.documents import BadRows
from flare.data.streaming.blocks import BlockWriter
from flare.data.streaming.lanes import Lane, LaneItem
from flare.data.streaming.messages import MAX_FULL_BLOCKS, ProducerConfig, Segment
from flare.data.streaming.position import Cursor, Place
from flare.data.token_cache.build import check_bad_rows, too_many_bad
from flare.errors import DataError, EnvError, FlareError

MAX_BLOCKS = 8
"""Maximum number of blocks on disk. It matters for a small corpus, whose blocks are short: without it the producer
would tokenize many epochs ahead. The rows of the steps that are kept may be in seven blocks."""
PARENT_CHECK_SEC = 5.0


class LaneMerger:
    """Takes segments from the lanes in turn and writes them into blocks."""

    def __init__(self, config: ProducerConfig, lanes: list[Lane]) -> None:
        self.config, self.lanes = config, lanes
        self.place = config.place
        self._count_from(config.place)
        self.seen_rows, self.seen_bad = 0, BadRows()  # since this process started, for the log
        self.turn, self.offset = config.place.turn, config.place.skip
        self.writer: BlockWriter | None = None
        self.num_pieces = len(config.worker_config.pieces)

    def _count_from(self, place: Place) -> None:
        self.rows, self.tokens = place.epoch_rows, place.epoch_tokens
        self.rows_read, self.bad = place.rows_read, place.bad

    def advance(self, may_start_block: bool) -> bool:
        """Write tokens of the current lane, up to the end of its segment or of the block.

        Args:
            may_start_block: whether there is space on disk for another block.

        Returns: whether anything was written or finished.
        Raises: DataError for an epoch that is too short or has too many bad rows.
        """
        lane = self.lanes[self.turn]
        if not lane.queue or (self.writer is None and not may_start_block):
            return False
        if self.writer is None:
            config = self.config
            self.writer = BlockWriter(config.directory, self.place, config.dtype, config.seq_len, config.block_rows)
        item = lane.queue[0]
        if item.tokens is not None:
            self._append(item)
            if self.writer.free_tokens == 0:
                self._finish_block(self.current_place())
                return True
            if self.offset < len(item.tokens):
                return True
        self._finish_item(lane, item)
        return True

    def _append(self, item: LaneItem) -> None:
        end = min(len(item.tokens), self.offset + self.writer.free_tokens)
        inside = item.starts[(item.starts >= self.offset) & (item.starts < end)]
        self.writer.append(item.tokens[self.offset : end], inside - self.offset)
        self.offset = end

    def _finish_item(self, lane: Lane, item: LaneItem) -> None:
        """Remove a used item, count its rows, and continue with the next lane or epoch."""
        lane.queue.popleft()
        lane.used = item.end
        self.offset = 0
        self.rows_read += item.rows
        self.bad.extend(item.bad)
        self.seen_rows += item.rows
        self.seen_bad.extend(item.bad)
        self._check_bad_rows(epoch_ended=False)
        unfinished = [n for n in range(len(self.lanes)) if self.lanes[n].used is not None]
        if not unfinished:
            self._finish_epoch()
        else:
            self.turn = next((n for n in unfinished if n > self.turn), unfinished[0])

    def current_place(self) -> Place:
        """The place of the next block. Its first token is the last token of this block."""
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
        """End the block here. Tokens that do not fill a row are dropped, as at the end of a token cache."""
        self._check_bad_rows(epoch_ended=True)
        rows, tokens = self.rows + self.writer.num_rows, self.tokens + self.writer.num_tokens
        if rows < self.config.step_rows:
            raise DataError(
                f"the data gives {tokens:,} training tokens in an epoch, one step needs "
                f"{self.config.step_rows * self.config.seq_len + 1:,}; lower --max_seq_length or the batch size"
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

    def _check_bad_rows(self, epoch_ended: bool) -> None:
        """Check the bad rows against the rows of the epoch. Before its end, the number of rows is that of
        ``--dataset_size`` if given, else the rows so far.

        Raises: DataError for too many bad rows.
        """
        share, total = self.config.max_bad_rows, self.config.total_rows
        rows = self.rows_read if epoch_ended or total is None else total
        if epoch_ended or too_many_bad(self.bad.count, rows, share, total):
            check_bad_rows(self.bad, rows - self.bad.count, share, quiet=True)


class Worker(Child):
    """A worker process, and whether a request to it is unanswered."""

    def __init__(self) -> None:
        super().__init__("flare.data.streaming.worker")
        self.is_busy = False

    def request(self, lane_piece_row: tuple[int, int, int]) -> None:
        """Request a segment. A worker answers one request at a time."""
        self.send(lane_piece_row)
        self.is_busy = True

    def receive(self) -> tuple[int, Segment]:
        """(lane, segment).

        Raises: the error of the reader; EnvError if the worker died.
        """
        try:
            lane, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise EnvError(
                f"a tokenising worker {self.describe_exit()}; the last checkpoint is good, and the same command "
                "continues from it; use fewer workers with --preprocessing_num_workers"
            ) from None
        self.is_busy = False
        if lane is None:
            raise answer
        return lane, answer

    def end(self) -> None:
        """Kill the process, even if it is busy."""
        self.process.kill()
        self.process.wait()


class Producer:
    """Workers, lanes and blocks of one host. It runs until the first rank closes the pipe."""

    def __init__(self, pipe: Connection, config: ProducerConfig, parent: int) -> None:
        self.pipe, self.config, self.parent = pipe, config, parent
        pieces = len(config.worker_config.pieces)
        self.lanes = [Lane(n, config.seed, pieces, config.place) for n in range(len(config.place.cursors))]
        self.merger = LaneMerger(config, self.lanes)
        self.workers: list[Worker] = []
        self.oldest = config.place.block
        self.sizes: dict[int, int] = {}

    def run(self) -> None:
        """Make blocks until the training ends.

        Raises: the errors of readers; EnvError if a worker died; DataError for too many bad rows or a short epoch.
        """
        count = max(1, min(self.config.num_workers, len(self.lanes)))
        self.workers = [Worker() for _ in range(count)]
        for worker in self.workers:
            worker.send(self.config.worker_config)
        while True:
            self._make_blocks()
            self._send_requests()
            self._check_parent()
            busy = {worker.pipe: worker for worker in self.workers if worker.is_busy}
            for pipe in wait([self.pipe, *busy], PARENT_CHECK_SEC):
                if pipe is self.pipe:
                    self._discard_below(self.pipe.recv())
                else:
                    lane, segment = busy[pipe].receive()
                    self.lanes[lane].receive_segment(segment)

    def _check_parent(self) -> None:
        """Check that the training process lives. The pipe alone is not enough: a fork of that process keeps it open.

        Raises: EOFError if the training process has ended.
        """
        if os.getppid() != self.parent:
            raise EOFError

    def _make_blocks(self) -> None:
        before = self.merger.place
        while self.merger.advance(self._has_space()):
            if self.merger.place.block > before.block:
                self.sizes[before.block] = self.merger.place.first_row - before.first_row
                self.pipe.send(("block", before.block, self.merger.seen_rows, self.merger.seen_bad))
            before = self.merger.place

    def _has_space(self) -> bool:
        kept = sum(self.sizes.values())
        return kept <= (MAX_FULL_BLOCKS - 1) * self.config.block_rows and len(self.sizes) < MAX_BLOCKS

    def _send_requests(self) -> None:
        """Send a request to each idle worker. A lane always has the same worker, which has its piece open."""
        for number, worker in enumerate(self.workers):
            own_lanes = self.lanes[number :: len(self.workers)]
            if not worker.is_busy and (candidates := [lane for lane in own_lanes if lane.needs_request]):
                count, turn = len(self.lanes), self.merger.turn
                most_urgent = min(candidates, key=lambda lane: (len(lane.queue), (lane.number - turn) % count))
                worker.request(most_urgent.next_request())

    def _discard_below(self, block: int | None) -> None:
        if block is None:  # the training has ended
            raise EOFError
        for number in range(self.oldest, block):
            shutil.rmtree(self.config.directory / f"{number:08d}", ignore_errors=True)
            self.sizes.pop(number, None)
        self.oldest = max(self.oldest, block)

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.end()

    def remove_blocks(self) -> None:
        """Delete all blocks. Not called after an error, because ranks may still read finished blocks."""
        shutil.rmtree(self.config.directory, ignore_errors=True)


def main() -> int:
    ignore_stop_signals()
    pipe = Connection(int(sys.argv[1]))
    producer = Producer(pipe, pipe.recv(), int(sys.argv[2]))
    try:
        producer.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the training has ended
        producer.remove_blocks()
        return 0
    except OSError as error:
        directory = producer.config.directory
        failure = EnvError(f"cannot write to {directory}: {error.strerror or error}; {CACHE_DIR_HINT}")
    except FlareError as error:
        failure = error
    finally:
        producer.close()
    with contextlib.suppress(OSError):
        pipe.send(("error", failure))
    return failure.exit_code


if __name__ == "__main__":
    sys.exit(main())

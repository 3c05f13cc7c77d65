"""The order of streamed rows: pieces, lanes, segments and blocks in this process, with a simple tokenizer."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flare.data.sources.base import Piece, Row
from flare.data.sources.files import FileSource
from flare.data.streaming import pieces as pieces_module
from flare.data.streaming.blocks import Block
from flare.data.streaming.held_out import survey
from flare.data.streaming.lanes import Lane
from flare.data.streaming.messages import ProducerConfig, WorkerConfig
from flare.data.streaming.pieces import streamed_pieces
from flare.data.streaming.position import MAX_LANES, Cursor, Place, lane_pieces
from flare.data.streaming.producer import LaneMerger
from flare.data.streaming.worker import OpenPiece
from flare.data.token_cache import encode
from flare.data.token_cache.cache import TokenSettings
from flare.data.token_cache.encode import Encoder
from flare.errors import DataError

SEQ_LEN = 7
END = 999


class Spelling:
    """A tokenizer with one id per word."""

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


ENCODER = Encoder(Spelling(), END, 1000)


class Texts(Piece):
    """A piece with its rows in memory."""

    def __init__(self, values: list[object]) -> None:
        self.values = values

    def rows(self) -> list[Row]:
        return iter([Row(value, f"row {n}") for n, value in enumerate(self.values)])


def corpus(num_pieces: int, seed: int, bad: float = 0.0) -> list[Piece]:
    """Documents of 1 to 9 words; all have different first words."""
    rng = random.Random(seed)
    number = 0
    found = []
    for _ in range(num_pieces):
        values: list[object] = []
        for _ in range(rng.randint(0, 12)):
            number += 1
            words = [number // 30, number % 30, *(rng.randint(0, 900) for _ in range(rng.randint(0, 7)))]
            values.append(None if rng.random() < bad else " ".join(map(str, words)))
        found.append(Texts(values))
    return found


def config_of(pieces: list[Piece], directory: Path, place: Place | None = None, **changes: object) -> ProducerConfig:
    directory.mkdir(parents=True, exist_ok=True)
    facts = {
        "worker_config": WorkerConfig({}, pieces, [None] * len(pieces), 0), "place": place or Place.start(len(pieces)),
        "directory": directory, "dtype": ENCODER.dtype, "seed": 5, "seq_len": SEQ_LEN, "block_rows": 6,
        "step_rows": 1, "max_bad_rows": 0.5, "total_rows": None, "num_workers": 1,
    }  # fmt: skip
    return ProducerConfig(**facts | changes)


class InProcessProducer:
    """What the producer does, in one process: lanes are served in a random order."""

    def __init__(self, config: ProducerConfig, seed: int) -> None:
        self.config, self.rng = config, random.Random(seed)
        pieces = len(config.worker_config.pieces)
        self.lanes = [Lane(n, config.seed, pieces, config.place) for n in range(len(config.place.cursors))]
        self.merger = LaneMerger(config, self.lanes)

    def make(self, last_block: int) -> list[Block]:
        """All blocks up to this number."""
        while self.merger.place.block <= last_block:
            if self.merger.advance(may_start_block=True):
                continue
            lane = self.rng.choice([lane for lane in self.lanes if lane.needs_request])
            _, number, row = lane.next_request()
            lane.receive_segment(OpenPiece(self.config.worker_config, ENCODER, number, row).segment())
        numbers = range(self.config.place.block, last_block + 1)
        return [Block(self.config.directory / f"{number:08d}", END) for number in numbers]


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "BATCH_CHARACTERS", 40)


def contents(block: Block) -> tuple:
    return block.tokens.tolist(), block.offsets.tolist(), block.place, block.end, block.num_rows


def documents_of(blocks: list[Block]) -> list[tuple[int, ...]]:
    """The documents of one epoch's blocks; the last one may be truncated."""
    stream = np.concatenate([blocks[0].tokens[:1], *(block.tokens[1:] for block in blocks)])
    cuts = np.flatnonzero(stream == END) + 1
    return [tuple(part.tolist()) for part in np.split(stream, cuts) if len(part)]


def by_epoch(blocks: list[Block]) -> dict[int, list[Block]]:
    epochs: dict[int, list[Block]] = {}
    for block in blocks:
        epochs.setdefault(block.place.epoch, []).append(block)
    return epochs


@pytest.mark.parametrize("num_pieces", [1, 5, MAX_LANES, 40])
def test_every_document_once_an_epoch_and_epochs_differ(tmp_path: Path, num_pieces: int) -> None:
    pieces = corpus(num_pieces, seed=num_pieces)
    expected = [(*map(int, text.split()), END) for piece in pieces for text in piece.values]
    blocks = InProcessProducer(config_of(pieces, tmp_path), 0).make(80)
    epochs = by_epoch(blocks)
    whole = [epochs[n] for n in range(2)] if len(epochs) > 2 else [epochs[0]]
    for made in whole:
        found = documents_of(made)
        stream = sum(map(len, expected))
        rows = sum(block.num_rows for block in made)
        assert rows == (stream - 1) // SEQ_LEN  # as in a token cache of these documents
        missing = Counter(expected) - Counter(found[:-1])
        assert not Counter(found[:-1]) - Counter(expected)
        assert sum(map(len, missing)) < SEQ_LEN + 9 + sum(map(len, found[-1:]))
    if num_pieces > 1 and len(whole) == 2:
        assert documents_of(whole[0]) != documents_of(whole[1])


def test_documents_of_the_tail_are_the_only_ones_missing(tmp_path: Path) -> None:
    """By hand: a piece of three documents, 13 tokens: a row of 7 and its last label; 5 tokens are left over."""
    pieces = [Texts(["1 2 3 4", "5 6 7", "8 9 10"])]
    first, second = InProcessProducer(config_of(pieces, tmp_path), 0).make(1)
    assert first.tokens.tolist() == [1, 2, 3, 4, END, 5, 6, 7]
    assert first.offsets.tolist() == [0, 5, 8]
    assert (first.num_rows, first.place.epoch, first.end.epoch, first.end.first_row) == (1, 0, 1, 1)
    assert second.tokens.tolist() == first.tokens.tolist()


@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from([0.0, 0.2]))
@settings(max_examples=15, deadline=None)
def test_order_does_not_depend_on_which_worker_is_faster(
    tmp_path_factory: pytest.TempPathFactory, num_pieces: int, seed: int, bad: float
) -> None:
    pieces = [*corpus(num_pieces, seed, bad), Texts(["1 2 3 4 5 6 7 8"] * 2)]
    runs = [
        InProcessProducer(config_of(pieces, tmp_path_factory.mktemp("run") / str(n), max_bad_rows=1.0), n).make(12)
        for n in range(2)
    ]
    assert [contents(block) for block in runs[0]] == [contents(block) for block in runs[1]]


@given(st.integers(1, 30), st.integers(0, 1000), st.sampled_from([0.0, 0.2]))
@settings(max_examples=15, deadline=None)
def test_reading_continues_from_any_block(
    tmp_path_factory: pytest.TempPathFactory, num_pieces: int, seed: int, bad: float
) -> None:
    """From its recorded place as JSON, with the same bytes and counts."""
    pieces = [*corpus(num_pieces, seed, bad), Texts(["1 2 3 4 5 6 7 8"] * 2)]
    whole = InProcessProducer(config_of(pieces, tmp_path_factory.mktemp("whole"), max_bad_rows=1.0), 0).make(12)
    for start in range(1, 12, 3):
        for recorded in (whole[start].place, whole[start - 1].end):  # between them, an epoch's tail may be left out
            place = Place.from_json(json.loads(json.dumps(recorded.to_json())))
            assert place == recorded
            directory = tmp_path_factory.mktemp("again")
            again = InProcessProducer(config_of(pieces, directory, place, max_bad_rows=1.0), 7).make(12)
            assert [contents(block) for block in again] == [contents(block) for block in whole[start:]]


def test_a_record_is_small() -> None:
    assert len(json.dumps(Place((Cursor(1000, 100000),) * MAX_LANES).to_json())) < 1000


def test_lanes_share_the_pieces_of_an_epoch() -> None:
    for epoch in range(3):
        dealt = [piece for lane in range(MAX_LANES) for piece in lane_pieces(3, epoch, 50, lane)]
        assert sorted(dealt) == list(range(50))
    assert lane_pieces(3, 0, 50, 0) != lane_pieces(3, 1, 50, 0)


def test_held_out_documents_are_left_out_and_limits_kept(tmp_path: Path) -> None:
    from flare.data.sources.documents import text_hash

    texts = [f"{n} {n} {n}" for n in range(100, 200)]
    below = sorted(map(text_hash, texts))[40]
    config = config_of([Texts(texts)], tmp_path, block_rows=1000)
    worker_config = WorkerConfig({}, config.worker_config.pieces, [50], below)
    config = config_of([], tmp_path, Place.start(1), worker_config=worker_config, block_rows=1000)
    (block,) = InProcessProducer(config, 0).make(0)
    found = {document[0] for document in documents_of([block])}
    expected = {int(text.split()[0]) for text in texts[:50] if text_hash(text) >= below}
    assert found <= expected
    assert len(expected - found) <= 2  # the tail that is shorter than a row


# -- errors ------------------------------------------------------------------------------------------------------


def test_too_many_bad_rows_are_an_error_at_the_end_of_the_epoch(tmp_path: Path) -> None:
    pieces = [Texts(["1 2 3 4 5", None, None, "1 2 3 4 5"] * 8)]
    with pytest.raises(
        DataError, match=r"16 of 32 rows hold no usable text \(row 1 is null; row 2 is null\); limit is 40"
    ):
        InProcessProducer(config_of(pieces, tmp_path, max_bad_rows=0.4), 0).make(9)
    assert len(list(tmp_path.glob("0*"))) >= 1  # rows were produced before that was certain


def test_too_many_bad_rows_are_an_error_at_once_when_the_size_is_known(tmp_path: Path) -> None:
    pieces = [Texts([None] * 3 + ["1 2 3 4 5"] * 97)]
    with pytest.raises(DataError, match="3 of 100 rows"):
        InProcessProducer(config_of(pieces, tmp_path, max_bad_rows=0.02, total_rows=100), 0).make(9)
    assert list(tmp_path.glob("0*")) == []


def test_more_bad_rows_than_ten_thousand_may_hold_are_an_error_at_once(tmp_path: Path) -> None:
    """The rest of the data does not matter: reading it to the end would never finish."""
    pieces = [Texts([None] * 11 + ["1 2 3 4 5"] * 50_000)]
    with pytest.raises(DataError, match=r"11 of \d\d rows hold no usable text"):
        InProcessProducer(config_of(pieces, tmp_path, max_bad_rows=0.001), 0).make(0)


def test_bad_rows_at_the_beginning_say_little_of_the_rest(tmp_path: Path) -> None:
    pieces = [Texts([None] * 10 + ["1 2 3 4 5"] * 10_000)]
    assert len(InProcessProducer(config_of(pieces, tmp_path, max_bad_rows=0.001), 0).make(40)) == 41


def test_a_survey_ends_at_too_many_bad_rows(tmp_path: Path) -> None:
    read = []

    class Watched(Texts):
        def rows(self) -> Iterator[Row]:
            for row in super().rows():
                read.append(row)
                yield row

    pieces = [Watched([None] * 20 + ["1 2 3 4 5"] * 50_000)]
    with pytest.raises(DataError, match=r"11 of 11 rows hold no usable text .*limit is 0.10%"):
        survey(pieces, TokenSettings(), 0.1)
    assert len(read) == 12


def test_an_epoch_of_fewer_rows_than_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data gives 24 training tokens in an epoch, one step needs 29"):
        InProcessProducer(config_of([Texts(["1 2 3 4 5"] * 4)], tmp_path, step_rows=4), 0).make(0)


# -- pieces ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 120), min_size=1, max_size=40), st.integers(1, 200), st.booleans())
@settings(max_examples=40, deadline=None)
def test_line_splits_cover_every_line_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], piece_bytes: int, ends: bool
) -> None:
    """For lines longer and shorter than a piece, with and without a newline at the end."""
    file = tmp_path_factory.mktemp("split") / "x.jsonl"
    texts = [f"{number} {'x' * length}" for number, length in enumerate(lengths)]
    lines = [json.dumps({"text": text}) + "\n" * (1 + number % 2) for number, text in enumerate(texts)]
    file.write_text("".join(lines).rstrip("\n") + "\n" * ends)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE_BYTES", piece_bytes)
        found = streamed_pieces(FileSource([file], "text"))
    assert [row.value for piece in found for row in piece.rows()] == texts


def test_bad_lines_of_a_split_are_named_by_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", 40)
    lines = ['{"text": "good, and some way into it"}\n', '{"text": "good"}\n', "bad\n"]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    rows = [row for piece in streamed_pieces(FileSource([tmp_path / "x.jsonl"], "text")) for row in piece.rows()]
    assert rows[0].where == f"{tmp_path}/x.jsonl:1"
    begin = len(lines[0]) + len(lines[1])
    assert rows[2].where == f"{tmp_path}/x.jsonl:0 (counted from 0 at byte {begin})"

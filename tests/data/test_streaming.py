"""Streamed rows with real processes: producer and workers, the window on disk, killed processes, and clean-up."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from flare.config.parse import resolve
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.sources.hub import HubSource
from flare.data.sources.open import open_source
from flare.data.streaming.held_out import open_streamed, survey
from flare.data.streaming.pieces import streamed_facts, streamed_pieces
from flare.data.streaming.rows import StreamedRows
from flare.data.token_cache.cache import TokenSettings
from flare.data.validation_split import split_documents
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer
from tests.conftest import write_corpus
from tests.data.streams import ALONE, BLOCK_ROWS, SEQ_LEN, STEP_ROWS, read, rows_of, size_of, stream_of
from tests.data.test_token_cache import cache_of
from tests.processes import train


def test_one_piece_gives_the_rows_of_its_token_cache(base: Path, tmp_path: Path) -> None:
    """An epoch has the same training rows, shuffled by blocks, and the same held-out documents; labels, too."""
    file = write_corpus(tmp_path / "x.jsonl", 40)
    cache = cache_of(file, base, tmp_path / "cached")
    train, held_out = split_documents(cache.hashes, 10)
    expected = PackedRows(cache, train, SEQ_LEN, "document")
    corpus = stream_of(file, base, tmp_path / "streamed")
    assert len(corpus.pieces) == 1
    assert corpus.held_out.hashes.tolist() == cache.hashes[held_out].tolist()
    rows = rows_of(corpus, tmp_path / "streamed", block_rows=len(expected))
    rows.start(ALONE, None, STEP_ROWS)
    order = rows.rows(0, len(expected))
    found = rows.batch(order)
    rows.close()
    assert sorted(order) == list(range(len(expected)))
    assert order.tolist() != sorted(order)
    expected_rows = expected.batch(order)  # the first epoch's row r is the cache's row r
    assert np.array_equal(found.input_ids, expected_rows.input_ids)
    assert np.array_equal(found.labels, expected_rows.labels)
    assert np.array_equal(found.position_ids, expected_rows.position_ids)


def test_dataset_size_streams_the_first_documents_only(folder: Path, base: Path, tmp_path: Path) -> None:
    corpus = stream_of(folder, base, tmp_path, dataset_size=70)
    assert sum(corpus.limits) == 70
    rows = rows_of(corpus, tmp_path, block_rows=10_000)
    rows.start(ALONE, None, STEP_ROWS)
    rows.rows(0, 1)
    block = rows.blocks[0].block
    rows.close()
    cache = cache_of(folder, base, tmp_path / "cached", dataset_size=70)
    train, _ = split_documents(cache.hashes, 10)
    tokens = cache.offsets[train + 1] - cache.offsets[train]
    assert block.num_rows == (tokens.sum() - 1) // SEQ_LEN
    assert block.end.epoch == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_do_not_depend_on_the_number_of_workers(
    started: StreamedRows, folder: Path, base: Path, tmp_path: Path, workers: int
) -> None:
    other = rows_of(stream_of(folder, base, tmp_path), tmp_path, num_workers=workers)
    other.start(ALONE, None, STEP_ROWS)
    for ours, theirs in zip(read(started, 0, 120, 6), read(other, 0, 120, 6), strict=True):
        assert np.array_equal(ours, theirs)
    other.close()


def test_reading_continues_from_any_position(started: StreamedRows, folder: Path, base: Path, tmp_path: Path) -> None:
    """Over three epochs; positions at, before and after the ends of blocks and of the epoch."""
    expected_rows, places = [], {}
    for position in range(0, 2600):
        expected_rows += read(started, position, position + 1, 1)
        places[position + 1] = json.loads(json.dumps(started.place_at(position + 1)))
    epochs = [place["epoch"] for place in places.values()]
    assert max(epochs) >= 2
    turn = epochs.index(1) + 1
    corpus = stream_of(folder, base, tmp_path)
    for start in (1, BLOCK_ROWS - 1, BLOCK_ROWS, BLOCK_ROWS + 1, 333, turn - 1, turn, turn + 1):
        rows = rows_of(corpus, tmp_path)
        rows.start(ALONE, places[start], STEP_ROWS)
        assert np.array_equal(
            np.concatenate(read(rows, start, start + 60, 5)), np.concatenate(expected_rows[start : start + 60])
        )
        rows.close()


@pytest.mark.slow
def test_a_streamed_set_of_datasets_gives_its_shards(base: Path, tmp_path: Path) -> None:
    """``datasets``' own streaming, of a folder laid out as a data set; each shard is a piece."""
    (tmp_path / "set").mkdir()
    for number in range(3):
        write_corpus(tmp_path / "set" / f"train-{number}.jsonl", 20, seed=number)
    source = HubSource(SourceSpec(str(tmp_path / "set"), streaming=True))
    corpus = open_streamed(source, load_tokenizer(base), tmp_path / "cache", TokenSettings(), 10)
    assert len(corpus.pieces) == 3
    before = corpus.fingerprint
    rows = rows_of(corpus, tmp_path / "cache", block_rows=1000)
    rows.start(ALONE, None, STEP_ROWS)
    rows.rows(0, 1)
    made = rows.blocks[0].block
    rows.close()
    cache = cache_of(tmp_path / "set", base, tmp_path / "cached")
    train, _ = split_documents(cache.hashes, 10)
    assert made.num_rows == (int((cache.offsets[train + 1] - cache.offsets[train]).sum()) - 1) // SEQ_LEN
    write_corpus(tmp_path / "set" / "train-3.jsonl", 20)
    changed = HubSource(SourceSpec(str(tmp_path / "set"), streaming=True))
    again = open_streamed(changed, load_tokenizer(base), tmp_path / "cache", TokenSettings(), 10)
    assert again.fingerprint != before


# -- the window ---------------------------------------------------------------------------------------------------


def test_the_window_is_bounded_and_removed(folder: Path, base: Path, tmp_path: Path) -> None:
    """At no step, over twelve epochs of a corpus of many blocks, more tokens on disk than three blocks have."""
    rows = rows_of(stream_of(folder, base, tmp_path), tmp_path)
    rows.start(ALONE, None, STEP_ROWS)
    directory = rows.source.directory
    most = seen = 0
    for position in range(0, 6000, 10):
        rows.batch(rows.rows(position, position + 10))
        seen = max(seen, rows.next_block)
        sizes = [size_of(file) for file in directory.glob("*/tokens.bin")]  # also hidden ones
        most = max(most, sum(sizes))
    itemsize = rows.corpus.encoder.dtype.itemsize
    assert seen > 60
    assert 0 < most <= 3 * (BLOCK_ROWS * SEQ_LEN + 1) * itemsize
    rows.close()
    assert list((tmp_path / "streaming").glob("*/")) == []


def test_bad_rows_are_counted_in_the_log_or_are_an_error(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the survey has seen all rows, before anything is trained."""
    write_corpus(tmp_path / "c.jsonl", 60)
    with open(tmp_path / "c.jsonl", "a") as file:
        file.write('{"text": null}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"2 of 62 rows .*c.jsonl:\d+ \(counted .*\) is null.*--max_bad"):
        stream_of(tmp_path / "c.jsonl", base, tmp_path / "a")
    rows = rows_of(stream_of(tmp_path / "c.jsonl", base, tmp_path / "b", max_bad_rows=0.1), tmp_path / "b")
    rows.start(ALONE, None, STEP_ROWS)
    with caplog.at_level("WARNING", logger="flare"):
        read(rows, 0, 800, 4)
    rows.close()
    assert re.search(r"\d of the \d+ rows read since this start hold no usable text .*c.jsonl:\d+", caplog.text)


def test_an_error_of_a_reader_reaches_the_rank(folder: Path, base: Path, tmp_path: Path) -> None:
    """A file that is damaged after the rows that the survey reads."""
    file = tmp_path / "c" / "0.jsonl"
    file.parent.mkdir()
    write_corpus(file, 60)
    corpus = stream_of(file.parent, base, tmp_path)
    file.unlink()
    rows = rows_of(corpus, tmp_path)
    rows.start(ALONE, None, STEP_ROWS)
    with pytest.raises(DataError, match=r"the data .*0.jsonl cannot be read: No such file"):
        rows.rows(0, 4)
    rows.close()


@pytest.mark.filterwarnings("ignore")  # warnings of datasets
def test_a_file_that_the_survey_cannot_read_is_a_data_error(folder: Path, base: Path, tmp_path: Path) -> None:
    """Neither a cache directory that cannot be written nor a traceback: a file that is gone, a damaged shard."""
    source = open_source(SourceSpec(str(write_corpus(tmp_path / "gone.jsonl", 5)), streaming=True), tmp_path)
    pieces = streamed_pieces(source)
    source.files[0].unlink()
    for broken in (lambda: streamed_facts(source), lambda: survey(pieces, TokenSettings(), 10)):
        with pytest.raises(DataError, match=r"the data .*gone.jsonl cannot be read: No such file"):
            broken()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"te')
    source = HubSource(SourceSpec(str(tmp_path / "set"), streaming=True))
    with pytest.raises(DataError, match=r"set cannot be read after its first 0 rows \(ArrowInvalid: JSON parse error"):
        open_streamed(source, load_tokenizer(base), tmp_path / "cache", TokenSettings(), 10)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--streaming", "--num_train_epochs", "2"], "--streaming never knows; give --max_steps"),
        (["--streaming", "--prepare_only"], "--prepare_only builds a token cache, but --streaming does not use one"),
        (["--streaming_buffer_rows", "64"], "--streaming_buffer_rows has no effect without --streaming"),
    ],
)
def test_flags_that_cannot_be_used_with_streaming_are_errors(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        resolve(flags)


def test_data_that_cannot_be_streamed_is_an_error_before_a_model_is_loaded(
    train_flags: list[str], tmp_path: Path
) -> None:
    """One-line errors that leave no files: too few tokens for a step, fewer rows shuffled than a step has."""
    write_corpus(tmp_path / "few.jsonl", 3)
    flags = [*train_flags, "--streaming", "--cache_dir", tmp_path / "cache"]
    few = train(*flags, "--dataset_name", tmp_path / "few.jsonl", "--per_device_train_batch_size", 64)
    assert few.returncode == 3, few.stderr
    assert re.search(r"error: the data gives \d+ training tokens in an epoch, one step needs 2,049", few.stderr)
    assert " trainable, " not in few.stderr  # the line that counts the parameters of the model
    assert list((tmp_path / "cache" / "streaming").glob("*/")) == []
    small = train(*flags, "--streaming_buffer_rows", 1)
    assert small.returncode == 2, small.stderr
    assert "--streaming_buffer_rows 1 must be at least 10, the rows of 5 steps" in small.stderr


def test_a_corpus_of_one_document_is_an_error(base: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "the same"}\n' * 3)
    with pytest.raises(DataError, match="single document"):
        stream_of(tmp_path / "one.jsonl", base, tmp_path)


def test_the_survey_is_made_once(folder: Path, base: Path, tmp_path: Path) -> None:
    first = stream_of(folder, base, tmp_path)
    made = (first.held_out.directory / "meta.json").stat().st_mtime_ns
    again = stream_of(folder, base, tmp_path)
    assert again.held_out.directory == first.held_out.directory
    assert (again.held_out.directory / "meta.json").stat().st_mtime_ns == made

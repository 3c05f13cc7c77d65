"""Several streamed data sets with weights: shares, the order of each data set, and resuming, with real producers."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.data.mixture import Turns, seed_of
from flare.data.sources.base import SourceSpec
from flare.data.streaming.mixture import MixedStreams, StreamedMixture, most_rows, open_streams
from flare.data.streaming.rows import StreamSettings
from flare.data.token_cache.cache import TokenSettings
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer
from tests.conftest import write_corpus
from tests.data.streams import ALONE, read, rows_of
from tests.data.test_order_kills import STEPS, Runs
from tests.processes import train

WEIGHTS = [5.0, 3.0, 1.0]
STEP_ROWS = 4
BLOCK_ROWS = 90


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("sets")
    return [write_corpus(directory / f"{name}.jsonl", 60, seed=n) for n, name in enumerate("abc")]


def mixture_of(files: list[Path], base: Path, cache_dir: Path, weights: list[float] | None = None) -> StreamedMixture:
    specs = [SourceSpec(str(file), cache_dir=str(cache_dir), streaming=True) for file in files]
    return open_streams(specs, weights or WEIGHTS, load_tokenizer(base), TokenSettings(), 10)


@contextmanager
def started(mixture: StreamedMixture, cache_dir: Path, place: dict | None = None, workers: int = 2) -> Iterator:
    settings = StreamSettings(32, "document", 3, BLOCK_ROWS, cache_dir, workers)
    rows = MixedStreams(mixture, settings)
    rows.start(ALONE, place, STEP_ROWS)
    try:
        yield rows
    finally:
        rows.close()


def test_each_turn_reads_the_next_row_of_its_set(files: list[Path], base: Path, tmp_path: Path) -> None:
    """Compared with each data set streamed alone, over several epochs of the first one."""
    mixture, steps = mixture_of(files, base, tmp_path), 300
    with started(mixture, tmp_path) as rows:
        blocks = [stream.settings.block_rows for stream in rows.streams]
        mixed = np.concatenate(read(rows, 0, steps * STEP_ROWS, STEP_ROWS))
        assert rows.epochs(steps * STEP_ROWS) > 1
    turns = Turns([5, 3, 1]).sets
    sets = turns[np.arange(len(mixed)) % len(turns)]
    assert blocks == [70, 50, 30]
    for k, corpus in enumerate(mixture.corpora):
        alone = rows_of(corpus, tmp_path, seed=seed_of(3, k), block_rows=blocks[k])
        alone.start(ALONE, None, 1)
        own = mixed[sets == k]
        assert np.array_equal(own, np.concatenate(read(alone, 0, len(own), 1)))
        alone.close()


@pytest.mark.slow
def test_reading_continues_from_any_step(files: list[Path], base: Path, tmp_path: Path) -> None:
    """Also from a step in which the rarest set was not read since the last start, and with other workers."""
    mixture, last = mixture_of(files, base, tmp_path), 400
    places, whole, passes = {}, [], {}
    with started(mixture, tmp_path) as rows:
        for position in range(0, last, STEP_ROWS):
            whole += read(rows, position, position + STEP_ROWS, STEP_ROWS)
            places[position + STEP_ROWS] = json.loads(json.dumps(rows.place_at(position + STEP_ROWS)))
            passes[position + STEP_ROWS] = rows.epochs(position + STEP_ROWS)
    whole = np.concatenate(whole)
    for begin in (4, 52, 360):
        place = places[begin]
        for position in range(begin, begin + 3 * STEP_ROWS, STEP_ROWS):  # a start for every step
            with started(mixture, tmp_path, place, workers=1) as rows:
                (batch,) = read(rows, position, position + STEP_ROWS, STEP_ROWS)
                place = json.loads(json.dumps(rows.place_at(position + STEP_ROWS)))
                assert place == places[position + STEP_ROWS]
                assert rows.epochs(position + STEP_ROWS) == passes[position + STEP_ROWS]
            assert np.array_equal(batch, whole[position : position + STEP_ROWS])


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(1, 30), st.integers(0, 200))
def test_no_step_has_more_rows_of_a_set_than_most_rows(counts: list[int], step_rows: int, first: int) -> None:
    turns = Turns(counts)
    held = np.zeros(len(counts), dtype=int)
    for k, places, begin, end in turns.between(first, first + step_rows):
        held[k] = end - begin
        assert len(places) == held[k]
    assert held.sum() == step_rows
    most = most_rows(turns, step_rows)
    assert (held <= most).all()
    assert (most <= step_rows * turns.counts / turns.block + len(counts) + 1).all()


def test_held_out_documents_are_those_of_all_sets(files: list[Path], base: Path, tmp_path: Path) -> None:
    mixture = mixture_of(files, base, tmp_path)
    held_out = mixture.held_out_rows(32, "document")
    assert held_out.num_documents == sum(corpus.held_out.meta["num_documents"] for corpus in mixture.corpora)
    other = mixture_of(files, base, tmp_path, [1.0, 1.0, 1.0])
    assert other.fingerprint != mixture.fingerprint
    assert mixture_of(files, base, tmp_path, [10.0, 6.0, 2.0]).fingerprint == mixture.fingerprint  # the same shares


def test_weights_must_be_given_and_fit(files: list[Path], base: Path, tmp_path: Path) -> None:
    specs = [SourceSpec(str(file), streaming=True) for file in files]
    for weights, words in (
        (None, "--streaming of 3 data sets needs --dataset_weights"),
        ([1.0, 1.0], "has 2 weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_streams(specs, weights, load_tokenizer(base), TokenSettings(), 10)


def test_an_error_names_the_set(files: list[Path], base: Path, tmp_path: Path) -> None:
    small = write_corpus(tmp_path / "small.jsonl", 3)
    mixture = mixture_of([small, files[0]], base, tmp_path, [100.0, 1.0])
    settings = StreamSettings(512, "document", 3, BLOCK_ROWS, tmp_path, 1)
    rows = MixedStreams(mixture, settings)
    rows.start(ALONE, None, STEP_ROWS)
    with pytest.raises(DataError, match=rf"data set {re.escape(str(small))}: the data gives \d+ training tokens"):
        rows.rows(0, STEP_ROWS)
    rows.close()
    assert list((tmp_path / "streaming").glob("*/")) == []


@pytest.mark.slow
def test_a_run_killed_on_one_two_and_three_processes_reads_the_same_rows(
    files: list[Path], base: Path, tmp_path: Path
) -> None:
    """All processes are killed twice. Rows are compared by hash; three of every five are from the first data set."""
    names = ",".join(map(str, files[:2]))
    extra = ["--streaming", "--streaming_buffer_rows", "120", "--dataset_weights", "3,2"]
    whole, killed = (Runs(base, names, tmp_path / name, extra) for name in ("whole", "killed"))
    whole.finish()
    expected = whole.reading()
    assert sorted(expected) == list(range(STEPS))
    rows = [row for step in sorted(expected) for row, _ in expected[step]]
    assert [row % 2 for row in rows] == [0, 1, 0, 1, 0] * (len(rows) // 5) + [0, 1][: len(rows) % 5]
    killed.kill_after(7, processes=2)
    killed.kill_after(15, processes=1, micro=4)
    killed.finish(processes=3)
    assert killed.reading() == expected


@pytest.mark.slow
def test_more_processes_can_resume_and_other_weights_are_an_error(train_flags: list[str], files: list[Path]) -> None:
    flags = [*train_flags, "--streaming", "--dataset_name", ",".join(map(str, files)), "--dataset_weights"]
    first = train(*flags, "0.5,0.3,0.2")
    assert first.returncode == 0, first.stderr
    more = train(*flags, "0.5,0.3,0.2", "--max_steps", 8, "--nproc_per_node", 2)
    assert more.returncode == 0, more.stderr
    assert "the global batch stays 2 rows" in more.stderr
    changed = train(*flags, "0.3,0.5,0.2", "--max_steps", 10)
    assert changed.returncode == 2
    assert "dataset_weights: 0.5,0.3,0.2 -> 0.3,0.5,0.2" in changed.stderr

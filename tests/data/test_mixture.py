"""Several data sets at once: shares, order, epochs, split; and real runs of two and three sets."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.data.corpus import Corpus, open_corpus, split_names, split_specs, what_changed
from flare.data.mixture import MAX_BLOCK_ROWS, MixedOrder, MixedRows, block_counts, interleave
from flare.data.order import permutation
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.token_cache.cache import TokenSettings
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer
from tests.conftest import write_corpus
from tests.data.test_packing import FakeCache
from tests.processes import train

COUNTS = st.lists(st.integers(1, 12), min_size=2, max_size=5)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ([0.7, 0.3], [7, 3]),
        ([7, 3], [7, 3]),
        ([1, 1, 2], [1, 1, 2]),
        ([0.1, 0.2, 0.7], [1, 2, 7]),  # 0.1 + 0.2 is not 0.3 in floats
        ([0.3333, 0.6667], [3333, 6667]),
        ([0.33333, 0.66667], [3333, 6667]),
        ([1e-3, 1e3], None),
    ],
)
def test_blocks_have_the_weights(weights: list[float], counts: list[int] | None) -> None:
    if counts is None:
        with pytest.raises(ConfigError, match=r"--dataset_weights 0.001 is less than 1/10000"):
            block_counts(weights)
    else:
        assert block_counts(weights) == counts


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=6))
def test_rounded_weights_are_within_one_place_of_the_block(weights: list[float]) -> None:
    counts = block_counts(weights)
    assert sum(counts) <= MAX_BLOCK_ROWS
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count / sum(counts) - weight / sum(weights)) <= 1 / MAX_BLOCK_ROWS


def test_interleaving_by_hand() -> None:
    assert interleave([3, 1]).tolist() == [0, 0, 1, 0]  # at 1/6, 3/6, 5/6 and 1/2
    assert interleave([2, 0, 2]).tolist() == [0, 2, 0, 2]


@given(COUNTS, st.integers(0, 200))
def test_every_prefix_has_the_shares(counts: list[int], position: int) -> None:
    order = MixedOrder(0, [5] * len(counts), counts)
    ideal = position * np.array(counts) / sum(counts)
    assert np.abs(order.taken(position) - ideal).max() <= (len(counts) + 1) / 2
    assert order.taken(position).sum() == position


@given(COUNTS, st.lists(st.integers(1, 30), min_size=5, max_size=5), st.integers(0, 300), st.integers(1, 60))
def test_rows_at_a_position_are_those_of_reading_from_the_start(
    counts: list[int], sizes: list[int], first: int, length: int
) -> None:
    """Against the definition: go through the pattern one by one, each set through its permutations."""
    sizes = sizes[: len(counts)]
    base = np.cumsum([0, *sizes])
    pattern, taken, walked = interleave(counts), [0] * len(counts), []
    for position in range(first + length):
        k = int(pattern[position % len(pattern)])
        epoch, place = divmod(taken[k], sizes[k])
        walked.append(base[k] + permutation(7 + (k << 32), epoch, sizes[k])[place])
        taken[k] += 1
    assert MixedOrder(7, sizes, counts).rows(first, first + length).tolist() == walked[first:]


def packed(documents: list[list[int]], keep_last: bool = False) -> PackedRows:
    return PackedRows(FakeCache(documents), np.arange(len(documents)), 4, "document", keep_last)


def some_parts() -> list[PackedRows]:
    rng = np.random.default_rng(0)
    return [
        packed([[*rng.integers(low, low + 99, rng.integers(1, 20)), 0] for _ in range(number)])
        for low, number in ((100, 12), (1000, 3), (5000, 30))
    ]


@pytest.mark.parametrize("spread", [False, True])
def test_rows_of_several_sets_are_the_rows_of_each(spread: bool) -> None:
    parts = some_parts()
    mixed = MixedRows(["a", "b", "c"], parts, spread=spread)
    assert len(mixed) == sum(map(len, parts))
    expected = np.concatenate([part.batch(np.arange(len(part))).input_ids for part in parts])
    batch = mixed.batch(np.arange(len(mixed)))
    if spread:
        assert not np.array_equal(batch.input_ids, expected)
        head = batch.input_ids[: len(mixed) // 2].max(axis=1)
        shares = [np.mean((head >= low) & (head < low + 99)) for low in (100, 1000, 5000)]
        assert np.allclose(shares, [len(part) / len(mixed) for part in parts], atol=2 / (len(mixed) // 2))
    assert sorted(map(tuple, batch.input_ids)) == sorted(map(tuple, expected))
    for rows in (np.array([3]), np.arange(len(mixed))[::-3], np.random.default_rng(1).permutation(len(mixed))):
        some = mixed.batch(rows)
        assert np.array_equal(some.input_ids, batch.input_ids[rows])
        assert np.array_equal(some.position_ids, batch.position_ids[rows])
        assert np.array_equal(some.labels, batch.labels[rows])
        assert mixed.num_targets(rows) == (some.labels >= 0).sum()


def test_without_weights_an_epoch_reads_every_row_of_every_set_once() -> None:
    mixed = MixedRows(["a", "b", "c"], some_parts())
    rows = mixed.order(3).rows(0, 2 * len(mixed))
    assert sorted(rows[: len(mixed)]) == sorted(rows[len(mixed) :]) == list(range(len(mixed)))
    assert mixed.epochs(len(mixed)) == 1
    assert "1.50 epochs" in mixed.passes(len(mixed) * 3 // 2)[0]


def test_with_weights_a_small_set_repeats_and_no_row_is_read_more_often_than_another_of_its_set() -> None:
    mixed = MixedRows(["a", "b", "c"], some_parts(), counts=[2, 2, 1])
    length = 20 * len(mixed)
    counts = np.bincount(mixed.order(3).rows(0, length), minlength=len(mixed))
    for k, weight in enumerate((0.4, 0.4, 0.2)):
        mine = counts[mixed.first[k] : mixed.first[k + 1]]
        assert mine.max() - mine.min() <= 1
        assert mine.sum() == pytest.approx(weight * length, abs=2)
        line = mixed.passes(length)[k]
        assert float(re.search(r"([\d.]+) epochs", line)[1]) == pytest.approx(mine.mean(), abs=0.01)
        assert f"{weight:.1%} of the run" in line


# -- names ------------------------------------------------------------------------------------------------


def test_commas_separate_names_unless_they_are_part_of_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one,two.txt").touch()
    assert split_names("one,two.txt") == ["one,two.txt"]
    assert split_names("a.jsonl,one,two.txt,lab/set") == ["a.jsonl", "one,two.txt", "lab/set"]
    assert split_names("a.jsonl, b.jsonl,") == ["a.jsonl", "b.jsonl"]
    assert split_names("embedded") == ["embedded"]


def test_lists_have_one_value_for_all_or_one_for_each() -> None:
    specs = split_specs(SourceSpec("a,b", "text,body", dataset_config="en,", dataset_split="test"))
    assert [(s.dataset_name, s.text_column, s.dataset_config, s.dataset_split) for s in specs] == [
        ("a", "text", "en", "test"),
        ("b", "body", None, "test"),
    ]
    assert split_specs(SourceSpec("a", "one,column"))[0].text_column == "one,column"
    with pytest.raises(ConfigError, match=r"--text_column a,b,c names 3, --dataset_name 2 data sets"):
        split_specs(SourceSpec("x,y", "a,b,c"))
    with pytest.raises(ConfigError, match="names x twice"):
        split_specs(SourceSpec("x,y,x"))


# -- token caches -------------------------------------------------------------------------------------------


def corpus_of(files: list[Path], base: Path, cache_dir: Path, weights: list[float] | None = None) -> Corpus:
    specs = [SourceSpec(str(file)) for file in files]
    return open_corpus(specs, weights, load_tokenizer(base), cache_dir, TokenSettings())


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write_corpus(tmp_path / f"{name}.jsonl", 40 * (n + 1), seed=n) for n, name in enumerate("abc")]


def test_one_more_set_or_other_weights_tokenise_nothing_again(files: list[Path], base: Path, tmp_path: Path) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "c").glob("tokens-*/meta.json")}

    two = corpus_of(files[:2], base, tmp_path / "c")
    before = stamps()
    assert len(before) == 2
    three = corpus_of(files, base, tmp_path / "c", [1, 1, 2])
    assert len(stamps()) == 3
    assert before.items() <= stamps().items()
    other = corpus_of(files, base, tmp_path / "c", [1, 1, 3])
    again = corpus_of(files, base, tmp_path / "c", [0.25, 0.25, 0.5])
    assert len(stamps()) == 3
    assert len({two.fingerprint, three.fingerprint, other.fingerprint}) == 3
    assert again.fingerprint == three.fingerprint  # the same shares
    assert corpus_of(files[:1], base, tmp_path / "c").fingerprint == three.sets[0].cache.fingerprint


def test_the_split_is_by_hash_over_all_sets(files: list[Path], base: Path, tmp_path: Path) -> None:
    """A document that is in two data sets is on the same side in both."""
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(files[0].read_text().splitlines(keepends=True)[::2]) + files[2].read_text())
    corpus = corpus_of([files[0], copy], base, tmp_path / "c")
    train_rows, held_out = corpus.rows(10, 16, "document")
    sides = []
    for rows in (train_rows, held_out):
        begins = [set(map(int, part.first)) for part in rows.parts]
        caches = [part.cache for part in rows.parts]
        sides.append(
            {int(c.hashes[np.searchsorted(c.offsets, b)]) for c, bs in zip(caches, begins, strict=True) for b in bs}
        )
    assert sides[0]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert train_rows.num_documents + held_out.num_documents == sum(len(d.cache.hashes) for d in corpus.sets)


def test_a_wrong_number_of_weights_is_an_error_before_tokenising(
    files: list[Path], base: Path, tmp_path: Path
) -> None:
    for chosen, weights in ((files, [1, 2]), (files[:1], [1])):
        with pytest.raises(ConfigError, match=rf"has {len(weights)} weights for {len(chosen)} data sets"):
            corpus_of(chosen, base, tmp_path / "c", weights)
    with pytest.raises(ConfigError, match=r"nothing.jsonl: no such file"):
        corpus_of([files[0], tmp_path / "nothing.jsonl"], base, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_set_without_a_row_is_named(files: list[Path], base: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.jsonl").write_text('{"text": "two"}\n{"text": "words"}\n')
    corpus = corpus_of([files[0], tmp_path / "tiny.jsonl"], base, tmp_path / "c")
    with pytest.raises(DataError, match=r"data set .*tiny.jsonl gives \d+ training tokens, not one row of 64"):
        corpus.rows(10, 64, "document")


# -- real runs --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_weighted_sets_resumes_on_the_same_rows(
    train_flags: list[str], files: list[Path], tmp_path: Path
) -> None:
    body = write_corpus(tmp_path / "body.jsonl", 30, seed=9, column="body")
    flags = [
        *train_flags, "--dataset_name", f"{files[0]},{body},{files[2]}", "--dataset_weights", "0.5,0.25,0.25",
        "--text_column", "text,body,text", "--save_steps", "2",
    ]  # fmt: skip
    full = train(*flags)
    assert full.returncode == 0, full.stderr
    assert re.search(r"data set .*body.jsonl: \d+ rows, 25.0% of the run, [\d.]+ epochs", full.stderr)
    run = tmp_path / "out" / "run"
    weights = (run / "final_model" / "model.safetensors").read_bytes()
    for directory in ("checkpoints/checkpoint-6", "checkpoints/checkpoint-4", "final_model"):
        shutil.rmtree(run / directory)
    resumed = train(*flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes from checkpoint-2" in resumed.stderr
    assert (run / "final_model" / "model.safetensors").read_bytes() == weights
    changed = train(*flags, "--max_steps", 8, "--dataset_weights", "0.25,0.5,0.25")
    assert changed.returncode == 2
    assert "data: dataset_weights: 0.5,0.25,0.25 -> 0.25,0.5,0.25" in changed.stderr
    less = train(*flags, "--max_steps", 8, "--dataset_name", f"{files[0]},{body}", "--text_column", "text,body",
                 "--dataset_weights", "1,1")  # fmt: skip
    assert less.returncode == 2
    assert f"{files[2]}: file c.jsonl is gone" in less.stderr


@pytest.mark.slow
def test_prepare_only_builds_the_cache_of_every_set(train_flags: list[str], files: list[Path]) -> None:
    flags = [*train_flags, "--dataset_name", ",".join(map(str, files))]
    result = train(*flags, "--prepare_only")
    assert result.returncode == 0, result.stderr
    assert "documents: 240 (" in result.stdout
    assert result.stdout.count("path: ") == 3
    run = train(*flags, "--max_steps", 1)
    assert run.returncode == 0, run.stderr
    assert "tokenised" not in run.stderr


def test_what_changed_names_at_most_a_few() -> None:
    then = {"a": "1", "b": "2", "c": "3"}
    assert what_changed(then, {"a": "1", "b": "4", "d": "5"}) == "b: 2 -> 4, c is gone, d is new"
    assert what_changed(None, then) is None
    assert what_changed(then, then) is None
    many = what_changed({"x": "0"}, {f"file {n}": "1" for n in range(9)})
    assert many.endswith("and 5 more changes")

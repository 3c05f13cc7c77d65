"""The content of a token cache, and when it is built again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flare.data.token_cache.encode import end_of_text_id
from flare.errors import DataError, EnvError
from flare.nope.load import load_tokenizer
from tests.conftest import write_corpus
from tests.data.test_packing import TEXTS, write_files
from tests.data.test_token_cache import cache_of


def test_cached_tokens_decode_to_the_documents(tmp_path: Path, base: Path) -> None:
    cache = cache_of(write_files(tmp_path)["jsonl"], base, tmp_path / "c")
    tokenizer = load_tokenizer(base)
    end = end_of_text_id(tokenizer)
    assert cache.meta["end_of_text"] == "<|endoftext|>"
    for number, text in enumerate(TEXTS):
        ids = cache.tokens[cache.offsets[number] : cache.offsets[number + 1]]
        assert ids[-1] == end
        assert tokenizer.decode(ids[:-1]) == text


def test_cache_is_built_once_and_again_when_the_content_changes(tmp_path: Path, base: Path) -> None:
    file = write_corpus(tmp_path / "x.jsonl", 20)
    first = cache_of(file, base, tmp_path / "c")
    stamp = (first.directory / "meta.json").stat().st_mtime_ns
    file.touch()  # same bytes, new timestamp: the same data
    again = cache_of(file, base, tmp_path / "c")
    assert again.directory == first.directory
    assert (again.directory / "meta.json").stat().st_mtime_ns == stamp
    write_corpus(file, 20, seed=1)
    assert cache_of(file, base, tmp_path / "c").directory != first.directory


def test_a_finished_cache_is_used_in_a_read_only_directory(tmp_path: Path, base: Path) -> None:
    """Such as a cache of another user. Root may write anywhere, so a directory replaces the lock file."""
    file = write_corpus(tmp_path / "x.jsonl", 20)
    made = cache_of(file, base, tmp_path / "c")
    (lock,) = (tmp_path / "c").glob(".tokens-*.lock")
    lock.unlink()
    lock.mkdir()
    assert cache_of(file, base, tmp_path / "c").directory == made.directory
    shutil.rmtree(made.directory)
    with pytest.raises(
        EnvError, match=r"cannot write the token cache .*: Is a directory; give another directory with --cache_dir"
    ):
        cache_of(file, base, tmp_path / "c")


def test_dataset_size_takes_the_first_documents(tmp_path: Path, base: Path) -> None:
    file = write_corpus(tmp_path / "x.jsonl", 20)
    full, part = cache_of(file, base, tmp_path / "c"), cache_of(file, base, tmp_path / "c", dataset_size=5)
    assert part.meta["num_documents"] == 5
    assert np.array_equal(part.tokens, full.tokens[: len(part.tokens)])


BAD_ROWS = [
    b'{"text": null}',
    b'{"text": 5}',
    b'{"text": ""}',
    b'{"text": ["a"]}',
    b'{"text": NaN}',
    b'{"other": "x"}',
    b'{"text": "\xff\xfe"}',
    b'{"text": "lone \\ud800 surrogate"}',
    b'{"text": "cut off',
]


def test_bad_rows_are_counted_and_named_and_all_good_rows_are_used(tmp_path: Path, base: Path) -> None:
    good = [json.dumps({"text": f"good {n}"}).encode() for n in range(20)]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([good[0], *BAD_ROWS, *good[1:]]) + b"\n")
    with pytest.raises(DataError, match=rf"{len(BAD_ROWS)} of 29 rows .*x.jsonl:2 is null.*--max_bad_rows"):
        cache_of(tmp_path / "x.jsonl", base, tmp_path / "c")
    cache = cache_of(tmp_path / "x.jsonl", base, tmp_path / "c", max_bad_rows=0.5)
    assert (cache.meta["num_documents"], cache.meta["bad_rows"]) == (20, len(BAD_ROWS))
    with pytest.raises(DataError, match="--max_bad_rows"):  # the limit is also checked for an existing cache
        cache_of(tmp_path / "x.jsonl", base, tmp_path / "c", max_bad_rows=0.1)

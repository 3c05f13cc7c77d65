"""Local files, folders, globs and saved data sets as --dataset_name, and errors for damaged ones."""

import errno
import os
import pickle
from pathlib import Path

import pytest

from flare.data.sources import base as base_module
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.streaming.pieces import streamed_facts, streamed_identity
from flare.errors import ConfigError, DataError
from tests.conftest import write_corpus
from tests.data.test_packing import TEXTS, read
from tests.data.test_token_cache import cache_of


def test_globs_take_the_files_that_match_by_name(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "c.md", "deep/d.txt", "deep/er/e.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path / "*.txt", tmp_path) == ["a.txt", "b.txt"]
    assert read(tmp_path / "[b-z].*", tmp_path) == ["b.txt"]
    assert read(tmp_path / "**" / "*.txt", tmp_path) == ["a.txt", "b.txt", "deep/d.txt", "deep/er/e.txt"]
    with pytest.raises(ConfigError, match=r"\*.csv: matches no file of the kinds .jsonl"):
        read(tmp_path / "*.csv", tmp_path)
    with pytest.raises(ConfigError, match="it matches 1 other files"):
        read(tmp_path / "*.md", tmp_path)
    (tmp_path / "odd[1].txt").write_text("brackets")  # an existing path is preferred to a pattern
    assert read(tmp_path / "odd[1].txt", tmp_path) == ["brackets"]


def test_files_with_equal_names_in_several_folders_are_distinguished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change in any of them is detected and named, also in streaming, which does not hash the files."""
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        write_corpus(tmp_path / "set" / name / "part.jsonl", 3, seed=ord(name))
    (tmp_path / "set" / ".cache" / "huggingface").mkdir(parents=True)  # as hf download creates it
    monkeypatch.chdir(tmp_path)
    expected = ["text_column", "file a/part.jsonl", "file b/part.jsonl"]
    for path in ("set/*/part.jsonl", "./set", str(tmp_path / "set")):
        source = open_source(SourceSpec(path), tmp_path / "c")
        assert list(source.describe()) == list(streamed_facts(source)) == expected
    before = streamed_identity(streamed_facts(source))
    write_corpus(tmp_path / "set" / "a" / "part.jsonl", 3)
    assert streamed_identity(streamed_facts(source)) != before


def test_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for folder, text in ((data, "one"), (elsewhere, "two")):
        folder.mkdir()
        (folder / "x.txt").write_text(text)
    (data / "linked").symlink_to(elsewhere)
    (data / "linked_again").symlink_to(elsewhere)
    (elsewhere / "ring").symlink_to(data)
    source = open_source(SourceSpec(str(data)), tmp_path / "cache")
    assert [row.value for row in source.rows()] == ["two", "one"]  # linked/x.txt comes before x.txt


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.txt", ".hidden.txt", ".ipynb_checkpoints/a.txt"):
        (tmp_path / name).write_text(name)
    assert read(tmp_path, tmp_path / "cache") == ["a.txt"]


def test_empty_files_among_others_are_skipped_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spark and others write one when they have no rows. An empty .parquet or compressed file is a failed download."""
    messages: list[str] = []
    monkeypatch.setattr("flare.data.sources.files.log.warning", messages.append)
    (tmp_path / "a.txt").write_text("one")
    alone = open_source(SourceSpec(str(tmp_path)), tmp_path / "cache")
    for name in ("b.jsonl", "c.csv"):
        (tmp_path / name).touch()
    source = open_source(SourceSpec(str(tmp_path)), tmp_path / "cache")
    assert messages == [f"skips 2 of 3 files because they are empty (0 bytes), first {tmp_path}/b.jsonl"]
    assert [row.value for row in source.rows()] == ["one"]
    assert (source.fingerprint(), source.describe()) == (alone.fingerprint(), alone.describe())
    with pytest.raises(DataError, match=r"b.jsonl is empty \(0 bytes\)"):
        read(tmp_path / "[bc].*", tmp_path / "cache")
    for name in ("d.parquet", "d.jsonl.gz", "d.csv.zst"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=rf"{name} is empty \(0 bytes\)"):
            read(tmp_path, tmp_path / "cache")
        (tmp_path / name).unlink()


def test_git_lfs_pointers_are_an_error(tmp_path: Path) -> None:
    """A clone without git-lfs has them in place of the data. As .txt they would be used for training."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize %d\n"
    (tmp_path / "a.txt").write_text("x" * len(pointer))
    for name, size in (("b.txt", 5), ("b.jsonl", 10**13), ("b.parquet", 10**6)):
        (tmp_path / name).write_text(pointer % size)
        with pytest.raises(
            DataError, match=rf"{name} is a Git LFS pointer, not the data; download it with git lfs pull"
        ):
            read(tmp_path, tmp_path / "cache")
        (tmp_path / name).unlink()
    assert len(read(tmp_path, tmp_path / "cache")) == 1


def test_used_and_ignored_file_types_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("flare.data.sources.files.log.info", messages.append)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    read(tmp_path, tmp_path / "cache")
    assert messages == []
    for name in ("LICENSE", "c.ndjson", "d.jsonl.bz2", "e.jsonl"):
        (tmp_path / name).write_text('{"text": "e"}')
    expected = "reads 1 .jsonl, 2 .txt files; skips other kinds (.bz2 .ndjson LICENSE)"
    for name in (tmp_path, tmp_path / "*"):
        assert len(read(name, tmp_path / "cache")) == 3
        assert messages.pop() == f"--dataset_name {name}: {expected}"


def test_broken_links_and_unreadable_folders_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a copy of the hub's cache without its blobs, and a folder of another user."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to("blobs/0123")
    for name in (tmp_path, tmp_path / "*.txt"):
        with pytest.raises(DataError, match=r"b.txt is a link to blobs/0123, which does not exist"):
            read(name, tmp_path / "cache")
    (tmp_path / "b.txt").unlink()
    (tmp_path / "theirs").mkdir()
    scandir = os.scandir  # root may read every folder, so the error is simulated

    def denied(path: str) -> object:
        if Path(path).name == "theirs":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"the data .*theirs cannot be read: Permission denied"):
        read(tmp_path, tmp_path / "cache")


def test_a_large_txt_is_reported_as_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("flare.data.sources.files.log.warning", messages.append)
    monkeypatch.setattr("flare.data.sources.files.LARGE_TXT_BYTES", 100)
    for name, size in (("small.txt", 100), ("large.txt", 101), ("large.csv", 101)):
        (tmp_path / name).write_text("text\n" + "x" * (size - 5))
    open_source(SourceSpec(str(tmp_path)), tmp_path / "cache").pieces()
    assert messages == [
        f"{tmp_path}/large.txt is read as one document of 101 bytes; a .jsonl file can hold one document per line"
    ]


def test_a_cache_directory_inside_the_data_is_ignored(tmp_path: Path, base: Path) -> None:
    (tmp_path / "data").mkdir()
    write_corpus(tmp_path / "data" / "a.jsonl", 20)
    first = cache_of(tmp_path / "data", base, tmp_path / "data" / "cache")
    again = cache_of(tmp_path / "data", base, tmp_path / "data" / "cache")
    assert again.directory == first.directory
    assert first.meta["num_documents"] == 20
    (again.directory / "x.jsonl").write_text('{"text": "cached"}\n')
    assert len(read(tmp_path / "data" / "**" / "*.jsonl", tmp_path / "data" / "cache")) == 20
    with pytest.raises(ConfigError, match=r"--cache_dir .*data is the data folder itself; give another"):
        cache_of(tmp_path / "data", base, tmp_path / "data")
    assert len(read(tmp_path / "data" / "*.jsonl", tmp_path / "data")) == 20


# -- save_to_disk ---------------------------------------------------------------------------------------------


def save(path: Path, texts: list[object] = TEXTS) -> Path:
    from datasets import Dataset

    Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).save_to_disk(path, num_shards=min(2, len(texts)))
    return path


def test_a_json_array_may_start_after_white_space(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(" \n" * 200 + '[{"text": "one"}]')
    assert [row.value for row in open_source(SourceSpec(str(file)), tmp_path / "cache").rows()] == ["one"]


def test_the_embedded_corpus_names_the_cache_directory_that_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--cache_dir .*/file cannot be created: File exists"):
        open_source(SourceSpec("embedded"), tmp_path / "file")


def test_a_split_of_a_plain_file_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("flare.data.sources.open.log.warning", messages.append)
    file = tmp_path / "x.txt"
    file.write_text("some text")
    open_source(SourceSpec(str(file)), tmp_path / "cache")
    assert messages == []
    for name in (str(tmp_path), str(tmp_path / "*.txt")):
        open_source(SourceSpec(name, dataset_split="validation"), tmp_path / "cache")
        assert messages.pop() == f"--dataset_split validation has no effect on {name}: all its rows are read"


def test_a_saved_data_set_is_identified_by_its_content(tmp_path: Path) -> None:
    path = save(tmp_path / "saved", [*TEXTS, None])
    source = open_source(SourceSpec(str(path)), tmp_path)
    rows = list(source.rows())
    assert [row.value for row in rows] == [*TEXTS, None]
    assert rows[3].where == f"{path}[3]"
    save(tmp_path / "again", [*TEXTS, None])
    assert open_source(SourceSpec(str(tmp_path / "again")), tmp_path).fingerprint() == source.fingerprint()
    save(tmp_path / "other", [*TEXTS, "x"])
    assert open_source(SourceSpec(str(tmp_path / "other")), tmp_path).fingerprint() != source.fingerprint()


def test_pieces_of_a_saved_data_set_can_be_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {number}" for number in range(500)]
    path = save(tmp_path / "saved", texts)
    monkeypatch.setattr(base_module, "MIN_PIECE_BYTES", 2000)
    pieces = open_source(SourceSpec(str(path)), tmp_path).pieces()
    assert len(pieces) > 3
    pickled = [pickle.dumps(piece) for piece in pieces]
    assert max(map(len, pickled)) < 10_000
    assert [row.value for data in pickled for row in pickle.loads(data).rows()] == texts


def test_a_saved_dataset_dict_needs_an_existing_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    path = tmp_path / "saved"
    DatasetDict({name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}).save_to_disk(path)
    assert read(path, tmp_path) == ["train"]
    assert read(path, tmp_path, dataset_split="test") == ["test"]
    with pytest.raises(ConfigError, match=r"--dataset_split tets: .* has the splits train, test; did you mean 'test'"):
        read(path, tmp_path, dataset_split="tets")
    with pytest.raises(ConfigError, match="single data set without splits"):
        read(path / "train", tmp_path, dataset_split="test")
    with pytest.raises(ConfigError, match=r"column 'txt' not in .* columns: text; .* did you mean 'text'"):
        read(path, tmp_path, text_column="txt")


def test_a_damaged_saved_data_set_is_a_one_line_error(tmp_path: Path) -> None:
    path = save(tmp_path / "saved")
    arrow = sorted(path.glob("*.arrow"))[1]
    content = arrow.read_bytes()
    for damage in (lambda: arrow.write_bytes(content[:200]), arrow.unlink):
        damage()
        with pytest.raises(DataError, match=r"saved is not a complete data set of save_to_disk"):
            read(path, tmp_path)
    arrow.write_bytes(content)
    with pytest.raises(DataError, match=r"none is a data set without rows"):
        read(save(tmp_path / "none", []), tmp_path)
    (path / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"state.json cannot be read"):
        read(path, tmp_path)

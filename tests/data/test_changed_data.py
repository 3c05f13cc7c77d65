"""Data that changed between two starts is an error that names the change. New timestamps alone are not."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flare.data.corpus import open_corpus, what_changed
from flare.data.sources.base import SourceSpec
from flare.data.sources.files import FileSource, find_files
from flare.data.token_cache.cache import TokenSettings
from flare.nope.load import load_tokenizer
from tests.conftest import write_base, write_corpus
from tests.processes import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "sub/c"):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        write_corpus(tmp_path / "corpus" / f"{name}.jsonl", 40, seed=ord(name[-1]))
    return tmp_path / "corpus"


def add_row(folder: Path) -> None:
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')


def change_in_place(folder: Path) -> None:
    """Change a word but not the size."""
    path = folder / "sub" / "c.jsonl"
    path.write_bytes(path.read_bytes().replace(b" the ", b" teh ", 1))


def swap(folder: Path) -> None:
    (folder / "a.jsonl").rename(folder / "x")
    (folder / "b.jsonl").rename(folder / "a.jsonl")
    (folder / "x").rename(folder / "b.jsonl")


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (add_row, r"data: file a\.jsonl: [\d,]+ bytes, sha256 \w{12} -> [\d,]+ bytes, sha256 \w{12}\)"),
    (change_in_place, r"data: file sub/c\.jsonl: ([\d,]+ bytes), sha256 \w{12} -> \1, sha256 \w{12}\)"),
    (lambda folder: write_corpus(folder / "d.jsonl", 5), r"data: file d\.jsonl is new\)"),
    (lambda folder: (folder / "b.jsonl").unlink(), r"data: file b\.jsonl is gone\)"),
    (swap, r"data: file a\.jsonl: .* -> .*, file b\.jsonl: .* -> "),
]


def test_a_resume_names_changed_data_and_accepts_new_timestamps(
    train_flags: list[str], folder: Path, tmp_path: Path
) -> None:

    flags = [*train_flags, "--dataset_name", folder, "--max_steps", 1]
    assert train(*flags).returncode == 0
    for file in folder.rglob("*.jsonl"):
        os.utime(file, (1, 1))
    more = [*flags, "--max_steps", 2]
    result = train(*more)
    assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-1" in result.stderr
    for change, words in CHANGES[:1]:
        copy = tmp_path / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        refused = train(*more, "--dataset_name", copy, "--max_steps", 3)
        assert refused.returncode == 2
        assert re.search(r"checkpoint-2 belongs to another run \(" + words, refused.stderr), refused.stderr


def facts(path: Path, base: Path, cache_dir: Path, column: str = "text", **settings: object) -> dict[str, str]:
    specs = [SourceSpec(str(path), column)]
    return open_corpus(specs, None, load_tokenizer(base), cache_dir, TokenSettings(**settings)).facts


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_every_change_of_the_files_is_named(
    folder: Path, base: Path, tmp_path: Path, change: Callable, words: str
) -> None:
    before = facts(folder, base, tmp_path / "c")
    change(folder)
    line = f"data: {what_changed(before, facts(folder, base, tmp_path / 'c'))})"

    assert re.match(words, line), line


def test_changes_of_column_size_and_tokenizer_are_named(tmp_path: Path, base: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "one", "body": "uno"}\n{"text": "two", "body": "dos"}\n')
    before = facts(file, base, tmp_path / "c")
    assert what_changed(before, facts(file, base, tmp_path / "c", "body")) == "text_column: text -> body"
    assert what_changed(before, facts(file, base, tmp_path / "c", dataset_size=1)) == "dataset_size: None -> 1"
    other = write_base(tmp_path / "other")
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace("NFC", "NFKC"))
    changed = what_changed(before, facts(file, other, tmp_path / "c"))
    assert changed.startswith("tokenizer: sha256 ")
    moved = (tmp_path / "elsewhere").absolute()
    moved.mkdir()
    assert what_changed(before, facts(file.rename(moved / "x.jsonl"), base, tmp_path / "c")) is None


def test_folders_are_named_when_there_are_many_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flare.data.sources.files.MAX_LISTED_FILES", 2)

    def described() -> dict[str, str]:
        return FileSource(find_files(folder, ""), "text", folder).describe()

    before = described()
    assert set(before) == {"text_column", "folder .", "folder sub"}
    assert before["folder ."].startswith("2 files, ")
    change_in_place(folder)
    assert what_changed(before, described()).startswith("folder sub: 1 files, ")

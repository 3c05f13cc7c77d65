"""Compressed files hold the same documents as plain ones; damaged archives are reported by name."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pytest

from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.errors import DataError
from tests.data.test_packing import TEXTS, read, write_files


def compress(file: Path, suffix: str) -> Path:
    """The file packed by a library other than the one that reads it, where Python has one; gone itself."""
    content, packed = file.read_bytes(), file.with_name(file.name + suffix)
    if suffix == ".gz":
        packed.write_bytes(gzip.compress(content))
    else:
        packed.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    file.unlink()
    return packed


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_give_the_same_documents(tmp_path: Path, kind: str, suffix: str) -> None:
    assert read(compress(write_files(tmp_path)[kind], suffix), tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_archives_of_several_members_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    """What ``cat a.gz b.gz`` and block-wise packers write."""
    parts = []
    for number in range(3):
        part = tmp_path / f"{number}.txt"
        part.write_text(f"part {number}\n" * 1000)
        parts.append(compress(part, suffix).read_bytes())
    whole = tmp_path / f"x.txt{suffix}"
    whole.write_bytes(b"".join(parts))
    assert read(whole, tmp_path) == ["".join(f"part {n}\n" * 1000 for n in range(3))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_damaged_archive_is_a_one_line_error_with_its_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "x.jsonl"
    random.seed(0)
    file.write_text("".join(json.dumps({"text": random.randbytes(500).hex()}) + "\n" for _ in range(500)))
    packed = compress(file, suffix)
    content = packed.read_bytes()
    wrongs = [content[: len(content) // 2], b"no archive at all", content[:-3]]
    if suffix == ".gz":  # a .zst holds a checksum only when who packed it asked for one
        wrongs.append(content[:1000] + bytes(64) + content[1064:])
    for wrong in wrongs:
        packed.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"x.jsonl{suffix} is damaged or truncated") as raised:
            read(packed, tmp_path)
        assert "\n" not in str(raised.value)


def test_bad_rows_in_an_archive_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n\n{"text": null}\n')
    packed = compress(tmp_path / "x.jsonl", ".zst")
    rows = list(open_source(SourceSpec(str(packed)), tmp_path).rows())
    assert [(row.value, row.where) for row in rows] == [("good", f"{packed}:1"), (None, f"{packed}:3")]

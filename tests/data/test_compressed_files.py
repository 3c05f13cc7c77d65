"""Compressed files have the same documents as plain ones; damaged compressed files are reported by name."""

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
    """Replace the file by a compressed one. For .gz, another library than the reader's compresses it."""
    content, compressed = file.read_bytes(), file.with_name(file.name + suffix)
    if suffix == ".gz":
        compressed.write_bytes(gzip.compress(content))
    else:
        compressed.write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    file.unlink()
    return compressed


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_compressed_files_give_the_same_documents(tmp_path: Path, kind: str, suffix: str) -> None:
    assert read(compress(write_files(tmp_path)[kind], suffix), tmp_path) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_with_several_members_are_read_to_their_end(tmp_path: Path, suffix: str) -> None:
    """As ``cat a.gz b.gz`` and block-wise compressors write them."""
    parts = []
    for number in range(3):
        part = tmp_path / f"{number}.txt"
        part.write_text(f"part {number}\n" * 1000)
        parts.append(compress(part, suffix).read_bytes())
    joined = tmp_path / f"x.txt{suffix}"
    joined.write_bytes(b"".join(parts))
    assert read(joined, tmp_path) == ["".join(f"part {n}\n" * 1000 for n in range(3))]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_damaged_compressed_file_is_a_one_line_error_with_its_name(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "x.jsonl"
    random.seed(0)
    file.write_text("".join(json.dumps({"text": random.randbytes(500).hex()}) + "\n" for _ in range(500)))
    compressed = compress(file, suffix)
    content = compressed.read_bytes()
    damaged_contents = [content[: len(content) // 2], b"no archive at all", content[:-3]]
    if suffix == ".gz":  # a .zst has a checksum only optionally
        damaged_contents.append(content[:1000] + bytes(64) + content[1064:])
    for damaged in damaged_contents:
        compressed.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"x.jsonl{suffix} is damaged or truncated") as raised:
            read(compressed, tmp_path)
        assert "\n" not in str(raised.value)


def test_bad_rows_in_a_compressed_file_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n\n{"text": null}\n')
    compressed = compress(tmp_path / "x.jsonl", ".zst")
    rows = list(open_source(SourceSpec(str(compressed)), tmp_path).rows())
    assert [(row.value, row.where) for row in rows] == [("good", f"{compressed}:1"), (None, f"{compressed}:3")]

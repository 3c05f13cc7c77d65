"""Data files in every format, with rows that are not text, and with changed bytes: whatever is read is what was
written, good rows are all used, bad ones counted; a file that cannot be read is an error of one line."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.data.sources import file_hashes, files
from flare.data.sources.base import SourceSpec
from flare.data.sources.documents import BadRows, usable_texts
from flare.data.sources.open import open_source
from flare.errors import FlareError
from tests.faults.changes import CHANGES, changed

GOOD = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
BAD_LINES = (
    b'{"text": null}', b'{"text": ""}', b'{"text": " \\n\\t"}', b'{"text": 5}', b'{"text": NaN}', b'{"text": ["a"]}',
    b'{"text": {"a": "b"}}', b'{"text": true}', b'{"other": "x"}', b'{"text": "\xff\xfe"}', b'{"text": "\\ud800"}',
    b'{"text": "cut', b"[1, 2]", b'"text"', b"nonsense", b"{", b"\x00", b'{"text": "a"} {"text": "b"}',
)  # fmt: skip
BLANK_LINES = (b"", b"   ", b"\t")


def line_of(text: str) -> bytes:
    return json.dumps({"id": 1, "text": text}, ensure_ascii=len(text) % 2 == 0).encode()


def read(directory: Path, name: str, content: bytes, piece_bytes: int = 2**25) -> tuple[list[str], int, list[str]]:
    """(usable texts, number of bad rows, the first ones) of a file of this name and content."""
    file = directory / name
    file.write_bytes(content)
    bad = BadRows()
    with pytest.MonkeyPatch.context() as patch:
        for module in (file_hashes, files):
            patch.setattr(module, "piece_bytes", lambda size: piece_bytes)
        source = open_source(SourceSpec(str(file)), directory)
        source.memo_dir = None
        texts = list(usable_texts(source.rows(), bad))
    return texts, bad.count, bad.first


@given(
    st.lists(GOOD.map(line_of) | st.sampled_from(BAD_LINES) | st.sampled_from(BLANK_LINES), max_size=12),
    st.sampled_from((b"\n", b"\r\n")),
    st.booleans(),
    st.integers(1, 200),
)
def test_good_lines_are_all_used_and_bad_ones_counted(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], newline: bytes, plain: bool, piece_bytes: int
) -> None:
    lines = [line_of("first"), *lines]
    bad = [line for line in lines if line in BAD_LINES]
    good = [json.loads(line)["text"] for line in lines if line not in (*BAD_LINES, *BLANK_LINES)]
    content = newline.join(lines) if plain else b"\xef\xbb\xbf" + newline.join(lines) + newline
    found = read(tmp_path_factory.getbasetemp(), "lines.jsonl", content, piece_bytes)
    assert found[:2] == (good, len(bad))
    assert [int(line.split(":")[1].split()[0]) for line in found[2]] == [
        number for number, line in enumerate(lines, 1) if line in BAD_LINES
    ][:5]
    packed = read(tmp_path_factory.getbasetemp(), "lines.jsonl.gz", gzip.compress(content))
    assert packed[:2] == found[:2]


@given(st.lists(GOOD, min_size=1, max_size=6), st.integers(0, 5), CHANGES, st.integers(1, 200))
def test_a_changed_line_costs_no_other(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], which: int, changes: list, piece_bytes: int
) -> None:
    lines = [line_of(text) for text in ("first", *texts)]
    which = 1 + which % len(texts)
    lines[which] = changed(lines[which], changes).replace(b"\n", b"?")
    found, bad, first = read(tmp_path_factory.getbasetemp(), "changed.jsonl", b"\n".join(lines) + b"\n", piece_bytes)
    others = ["first", *texts[: which - 1], *texts[which:]]
    if len(found) > len(others):  # still a document, of whatever text
        assert bad == 0
        del found[which]
    assert found == others
    assert bad == 0 or f"changed.jsonl:{which + 1} " in first[0]


# -- whole files with changed bytes -------------------------------------------------------------------------------


def as_csv(texts: list[str]) -> bytes:
    target = io.StringIO(newline="")
    csv.writer(target).writerows([["text", "id"], *([text, "1"] for text in texts)])
    return target.getvalue().encode()


def as_parquet(texts: list[str]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[str]], bytes]] = {
    "x.jsonl": lambda texts: b"\n".join(map(line_of, texts)),
    "x.json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    "x.csv": as_csv,
    "x.txt": lambda texts: "\n".join(texts).encode(),
    "x.parquet": as_parquet,
    "x.jsonl.gz": lambda texts: gzip.compress(b"\n".join(map(line_of, texts))),
    "x.json.gz": lambda texts: gzip.compress(json.dumps([{"text": text} for text in texts]).encode()),
    "x.jsonl.zst": lambda texts: pyarrow.compress(b"\n".join(map(line_of, texts)), "zstd", asbytes=True),
}


@given(st.sampled_from(sorted(WRITERS)), st.lists(GOOD, min_size=1, max_size=4))
def test_every_format_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[str]
) -> None:
    found, bad, _ = read(tmp_path_factory.getbasetemp(), name, WRITERS[name](texts))
    assert bad == 0
    assert found == (["\n".join(texts)] if name == "x.txt" else texts)


@given(st.sampled_from(sorted(WRITERS)), st.lists(GOOD, min_size=1, max_size=4), CHANGES)
def test_a_damaged_file_is_rows_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[str], changes: list
) -> None:
    """gzip has a checksum, so what is read from an archive is what was written."""
    content = changed(WRITERS[name](texts), changes)
    try:
        found, bad, _ = read(tmp_path_factory.getbasetemp(), name, content)
    except FlareError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert all(isinstance(text, str) and text.strip() for text in found)
    if name.endswith(".gz"):
        assert (found, bad) == (texts, 0)

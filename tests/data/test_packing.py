"""Sources, token cache, split and packing, on real files."""

import json
from pathlib import Path

import numpy as np
import pytest

from flare.data.packing import PackedRows
from flare.data.preview import row_lines
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.token_cache.encode import end_of_text_id
from flare.data.training_rows import IGNORE_INDEX
from flare.data.validation_split import split_documents
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer

TEXTS = ["first document of the model", "zweites Dokument: äöü 中文", "third\nwith\tlines and the rest"]


def read(path: Path, cache: Path, **spec: str) -> list[object]:
    return [row.value for row in open_source(SourceSpec(str(path), **spec), cache).rows()]


def write_files(directory: Path) -> dict[str, Path]:
    import pyarrow
    import pyarrow.parquet

    files = {kind: directory / f"data.{kind}" for kind in ("jsonl", "json", "csv", "parquet")}
    files["jsonl"].write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS), encoding="utf-8")
    files["json"].write_text(json.dumps([{"text": t} for t in TEXTS]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "id": [1, 2, 3]}), files["parquet"])
    import csv

    with open(files["csv"], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(TEXTS)])
    return files


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_file_kind_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    assert read(write_files(tmp_path)[kind], tmp_path) == TEXTS


def test_json_lines_in_a_json_file_are_read_as_lines(tmp_path: Path) -> None:
    write_files(tmp_path)["jsonl"].rename(tmp_path / "lines.json")
    assert read(tmp_path / "lines.json", tmp_path) == TEXTS


def test_a_folder_is_read_file_by_file_and_a_txt_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "book.txt").write_text("one\n\nbook", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "line"}\n', encoding="utf-8")
    (tmp_path / "notes.md").write_text("not data", encoding="utf-8")
    assert read(tmp_path, tmp_path / "cache") == ["line", "one\n\nbook"]


def test_missing_column_names_those_present(tmp_path: Path) -> None:
    for file in write_files(tmp_path).values():
        with pytest.raises(ConfigError, match=r"column 'body' not in .*columns: .*text.*use --text_column"):
            read(file, tmp_path, text_column="body")


def test_missing_file_and_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.jsonl: no such file"):
        read(tmp_path / "nothing.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "empty.jsonl", tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="has no files of the kinds"):
        read(tmp_path / "folder", tmp_path)


@pytest.mark.slow
def test_embedded_corpus_is_real_english_and_stays_the_same(tmp_path: Path) -> None:
    texts = read(Path("embedded"), tmp_path)
    assert len(texts) > 200
    assert sum(map(len, texts)) > 1_000_000
    assert sum(" the " in t for t in texts) > 0.9 * len(texts)
    assert read(Path("embedded"), tmp_path) == texts


# -- split -----------------------------------------------------------------------------------------------------


def test_split_is_a_percentage_and_stable_when_data_grows() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    train, held_out = split_documents(hashes, 5)
    assert abs(len(held_out) / 20_000 - 0.05) < 0.005
    assert sorted([*train, *held_out]) == list(range(20_000))
    _, smaller = split_documents(hashes[:10_000], 5)
    assert smaller.tolist() == [i for i in held_out.tolist() if i < 10_000]


def test_each_side_gets_at_least_one_document() -> None:
    hashes = np.array([5, 9, 7], dtype=np.uint64) << np.uint64(60)
    for percentage in (1e-9, 99.9999):
        train, held_out = split_documents(hashes, percentage)
        assert len(train) >= 1
        assert len(held_out) >= 1
    with pytest.raises(DataError, match=r"single document .*a .txt is one document, whatever its lines"):
        split_documents(np.array([3, 3], dtype=np.uint64), 5)


# -- packing -----------------------------------------------------------------------------------------------------


class FakeCache:
    """Documents given as lists of token ids, each ending with 0."""

    end_of_text_id = 0

    def __init__(self, documents: list[list[int]]) -> None:
        self.tokens = np.concatenate(documents).astype(np.uint16)
        self.offsets = np.cumsum([0, *map(len, documents)])


def test_rows_by_hand() -> None:
    cache = FakeCache([[11, 12, 0], [21, 0], [31, 32, 33, 0]])
    rows = PackedRows(cache, np.array([0, 2]), 3, "document", keep_last=True)  # the stream is 11 12 0 31 32 33 0
    assert (len(rows), rows.num_tokens, rows.num_documents) == (2, 7, 2)
    batch = rows.batch(np.array([0, 1]))
    assert batch.input_ids.tolist() == [[11, 12, 0], [31, 32, 33]]
    assert batch.labels.tolist() == [[12, 0, IGNORE_INDEX], [32, 33, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    concat = PackedRows(cache, np.array([0, 2]), 3, "concat").batch(np.array([0]))
    assert concat.labels.tolist() == [[12, 0, 31]]


def test_position_ids_restart_inside_a_row_and_a_short_last_row_has_no_targets_in_its_rest() -> None:
    cache = FakeCache([[11, 0], [21, 22, 0]])
    rows = PackedRows(cache, np.arange(2), 6, "document", keep_last=True)
    batch = rows.batch(np.array([0]))
    assert batch.input_ids.tolist() == [[11, 0, 21, 22, 0, 0]]
    assert batch.position_ids[0, :5].tolist() == [0, 1, 0, 1, 2]
    assert batch.labels.tolist() == [[0, IGNORE_INDEX, 22, 0, IGNORE_INDEX, IGNORE_INDEX]]
    assert len(PackedRows(cache, np.arange(2), 6, "document")) == 0


@pytest.mark.parametrize("packing", ["document", "concat"])
@pytest.mark.parametrize("seq_len", [1, 3, 8, 50])
def test_every_token_but_first_ones_is_a_target_once(packing: str, seq_len: int) -> None:
    rng = np.random.default_rng(seq_len)
    documents = [[*rng.integers(1, 9999, rng.integers(1, 20)), 0] for _ in range(30)]
    rows = PackedRows(FakeCache(documents), np.arange(30), seq_len, packing, keep_last=True)
    batch = rows.batch(np.arange(len(rows)))
    targets = batch.labels[batch.labels != IGNORE_INDEX].tolist()
    expected = (
        [t for d in documents for t in d[1:]] if packing == "document" else [t for d in documents for t in d][1:]
    )
    assert targets == expected
    counts = [rows.num_targets(np.array([r])) for r in range(len(rows))]
    assert counts == (batch.labels != IGNORE_INDEX).sum(axis=1).tolist()
    assert rows.num_targets(np.arange(len(rows))) == len(expected)


def test_a_row_is_shown_with_its_documents_and_their_ends(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    end = end_of_text_id(tokenizer)
    texts = [
        "the tail of one",
        "a line\nand a second",
        *["short"] * 6,
        "begin " + "of a long text " * 40,
        "and the last",
    ]
    ids = [np.array([*tokenizer(text)["input_ids"], end]) for text in texts]
    row = np.concatenate(ids)[:-1]  # the last document continues in the next row
    lines = row_lines(row, end, tokenizer)
    assert lines[0] == f"first row: {len(row)} tokens, 10 documents or parts of them"
    assert lines[1] == f"  | tokens 0-{len(ids[0]) - 1}: the tail of one<|endoftext|>"
    assert lines[2].endswith(": a line\\nand a second<|endoftext|>")
    assert lines[7] == "  | ... 3 more"
    assert lines[8] == f"  | tokens {len(row) - len(ids[-1]) + 1}-{len(row) - 1}: and the last"
    long = row_lines(ids[-2], end, tokenizer)[1]
    assert "begin of a long text" in long
    assert long.endswith("of a long text <|endoftext|>")
    assert len(long) < 160

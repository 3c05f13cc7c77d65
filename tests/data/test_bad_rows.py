"""Rows that are not text, in every format: they are counted and named by file and line; all other rows are used."""

import csv
import io
import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flare.data.sources.base import BadRow, SourceSpec
from flare.data.sources.documents import BadRows, usable_texts
from flare.data.sources.open import open_source
from flare.data.sources.records import array_elements
from flare.data.token_cache.build import build_token_cache
from flare.data.token_cache.cache import TokenSettings
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer
from tests.data.test_token_cache import cache_of
from tests.processes import train


def texts_and_bad(file: Path, **spec: str) -> tuple[list[str], list[str]]:
    """The usable texts of a file, and the bad rows as "PLACE REASON" without the folder."""
    bad = BadRows()
    texts = list(usable_texts(open_source(SourceSpec(str(file), **spec), file.parent).rows(), bad))
    assert len(bad.first) == min(bad.count, 5)
    return texts, [line.removeprefix(f"{file.parent}/") for line in bad.first]


def test_bom_crlf_nul_duplicate_keys_and_blank_lines_are_accepted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(
        b'\xef\xbb\xbf{"text": "bom"}\r\n\r\n{"text": "nul \\u0000 inside"}\r\n{"text": "first", "text": "last"}\n'
        b'   \n{"text": "line\\u2028separator \xe2\x80\xa8 too"}\n{"text": "no newline at the end"}'
    )
    assert texts_and_bad(file) == (
        ["bom", "nul \0 inside", "last", "line\u2028separator \u2028 too", "no newline at the end"],
        [],
    )


def test_lines_that_are_not_json_are_named_by_number(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    deep, digits = b"[" * 100_000, b'{"text": "a", "n": ' + b"9" * 5000 + b"}"
    file.write_bytes(b'{"text": "a"}\n' + deep + b"\n" + digits + b'\n[1]\n\xff\n{"text": "b"}\n{"text": "cut o')
    texts, bad = texts_and_bad(file)
    assert texts == ["a", "b"]
    assert [line.split(" (")[0] for line in bad] == [
        "x.jsonl:2 is not JSON",
        "x.jsonl:3 is not JSON",
        "x.jsonl:4 is not an object",
        "x.jsonl:5 is not UTF-8",
        "x.jsonl:7 is not JSON",
    ]


def test_csv_rows_over_several_lines_are_named_by_their_first_line(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(
        b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines, ""quoted"""\r\n2,\r\n\r\n3,cut, by a comma\n4\n5,b\xffd\n6,5" pipe\n'
        b'7,"never closed\n8,swallowed\n'
    )
    texts, bad = texts_and_bad(file)
    assert texts == ['two\r\nlines, "quoted"', '5" pipe']
    assert bad == [
        "x.csv:4 is empty",
        "x.csv:6 has 3 fields, the header has 2",
        "x.csv:7 has 1 fields, the header has 2",
        "x.csv:8 is not UTF-8",
        "x.csv:10 is cut off (a quote is not closed)",
    ]
    with pytest.raises(ConfigError, match=r"column 'txt' not in .*; columns: id, text; .*did you mean 'text'"):
        texts_and_bad(file, text_column="txt")


@pytest.mark.parametrize("encoding", ["utf-16", "gbk"])
def test_a_csv_header_that_is_not_utf8_is_an_error(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.csv").write_text("编号,内容\n1,x\n", encoding=encoding)
    with pytest.raises(DataError, match=r"x.csv has a header that is not UTF-8; convert the file to UTF-8") as raised:
        texts_and_bad(tmp_path / "x.csv", text_column="内容")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_with_other_separators_than_commas_is_an_error(tmp_path: Path, mark: str) -> None:
    (tmp_path / "x.csv").write_text(f"id{mark}text\n1{mark}one\n")
    with pytest.raises(ConfigError, match=re.escape(f"separates its columns with {mark!r}; a .csv file needs commas")):
        texts_and_bad(tmp_path / "x.csv")
    assert texts_and_bad(tmp_path / "x.csv", text_column=f"id{mark}text") == ([f"1{mark}one"], [])


def test_a_missing_column_error_is_short_when_there_are_many_or_long_columns(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(",".join(["0", "long " * 1000, *map(str, range(1, 99))]) + "\n")
    with pytest.raises(ConfigError) as raised:
        texts_and_bad(tmp_path / "x.csv")
    assert "columns: 0, long long" in str(raised.value)
    assert ", 28 and 70 more; use --text_column" in str(raised.value)
    assert len(str(raised.value)) < 500


def test_chat_messages_are_named_as_the_reason(tmp_path: Path, base: Path) -> None:
    chats = [[{"role": "user", "content": "hi"}], [{"from": "human", "value": "hi"}], [{"other": 1}], []]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    pyarrow.parquet.write_table(pyarrow.table({"messages": [chats[0]]}), tmp_path / "y.parquet")
    chat = "is a list of chat messages; convert it to one text with the model's chat template"
    _, bad = texts_and_bad(tmp_path / "x.jsonl", text_column="messages")
    assert bad == [
        f"x.jsonl:1 {chat}",
        f"x.jsonl:2 {chat}",
        "x.jsonl:3 is list, not text",
        "x.jsonl:4 is list, not text",
    ]
    assert texts_and_bad(tmp_path / "y.parquet", text_column="messages")[1] == [f"y.parquet[0] {chat}"]
    source = open_source(SourceSpec(str(tmp_path / "x.jsonl"), "messages"), tmp_path)
    with pytest.raises(
        DataError, match=r"4 of 4 rows hold no .*; the column that --text_column names must have UTF-8 text"
    ):
        build_token_cache(source, load_tokenizer(base), tmp_path / "c", TokenSettings())


def test_a_csv_quote_that_is_not_closed_makes_every_later_line_bad(tmp_path: Path) -> None:
    """Otherwise most rows of a large file could be lost but counted as one bad row."""
    file = tmp_path / "x.csv"
    file.write_text('id,text\n1,fine\n2,"open\n' + "3,row\n" * 100)
    rows = list(open_source(SourceSpec(str(file)), tmp_path / "cache").rows())
    assert [row.value for row in rows[:1]] == ["fine"]
    assert [type(row.value) for row in rows[1:]] == [BadRow] * 101
    assert str(rows[-1].value.reason) == "is inside the quote of line 3, which is not closed"


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8")), min_size=2, max_size=2), max_size=8))
def test_csv_rows_are_those_that_the_csv_module_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    target = io.StringIO(newline="")
    csv.writer(target).writerows([["id", "text"], *rows])
    file = tmp_path_factory.getbasetemp() / "written.csv"
    file.write_text(target.getvalue(), encoding="utf-8", newline="")
    source = open_source(SourceSpec(str(file)), file.parent)
    assert [row.value for row in source.rows()] == [text for _, text in rows]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]), st.booleans())
def test_arrays_are_read_like_the_json_module_reads_them(
    values: list, block: int, indent: int | None, is_ascii: bool
) -> None:
    text = f" \n{json.dumps(values, indent=indent, ensure_ascii=is_ascii)}\n "
    assert list(array_elements(io.StringIO(text), block=max(block, 3))) == values


@pytest.mark.parametrize("text", ["[", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", '["a', "[tru]", "[1}", "[,1]"])
@pytest.mark.parametrize("block", [1, 1000])
def test_invalid_arrays_are_errors(text: str, block: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        json.loads(text)
    with pytest.raises(ValueError, match=r"."):
        list(array_elements(io.StringIO(text), block))


def test_bad_elements_and_syntax_errors_of_a_json_array_are_named_by_index(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(b'\xef\xbb\xbf[{"text": "a"}, 5, {"text": "b\xff"}, {"text": "\\ud800"}, {"text": "c"}]')
    assert texts_and_bad(file) == (
        ["a", "c"],
        ["x.json[1] is not an object", "x.json[2] is not UTF-8", "x.json[3] has a lone surrogate"],
    )
    file.write_text('[{"text": "a"}, {"text": "b"}, {"text": ')
    with pytest.raises(DataError, match=r"x.json is not JSON after element 1: Expecting value"):
        texts_and_bad(file)


def test_a_json_object_over_several_lines_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"text": "a"}]}, indent=1))
    with pytest.raises(DataError, match=r"x.json is one JSON object over several lines; give an array"):
        texts_and_bad(tmp_path / "x.json")


def test_parquet_values_that_are_not_text_are_named_by_row(tmp_path: Path) -> None:
    bytes_ = pyarrow.array([b"good", None, b"\xff\xfe", b"", b"also good"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 5, bytes_.buffers())  # not validated, like other writers do
    numbers, nested = pyarrow.array([1, 2, 3, 4, 5]), pyarrow.array([{"text": "x"}] * 5)
    file = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": text, "n": numbers, "nested": nested}), file)
    assert texts_and_bad(file) == (
        ["good", "also good"],
        ["x.parquet[1] is null", "x.parquet[2] is not UTF-8 (byte 0)", "x.parquet[3] is empty"],
    )
    assert texts_and_bad(file, text_column="nested")[1][0] == "x.parquet[0] is dict, not text"
    assert texts_and_bad(file, text_column="n")[1][0] == "x.parquet[0] is int, not text"


def test_a_damaged_parquet_file_is_a_one_line_error(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    texts = [f"{number} {'x' * 200}" for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, use_dictionary=False, compression="gzip")
    content = bytearray(file.read_bytes())
    content[100:1000] = bytes(900)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"x.parquet is damaged after row 0 "):
        texts_and_bad(file)


def test_a_deleted_file_is_a_data_error_not_a_disk_error(tmp_path: Path, base: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    source = open_source(SourceSpec(str(tmp_path / "x.jsonl")), tmp_path)
    source.fingerprint()
    (tmp_path / "x.jsonl").unlink()
    with pytest.raises(DataError, match=r"the data .*x.jsonl cannot be read: No such file"):
        build_token_cache(source, load_tokenizer(base), tmp_path / "c", TokenSettings())


# -- unusual sizes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_document_of_12_mb_is_tokenised_as_one(tmp_path: Path, base: Path) -> None:
    phrase = "the layer of the model"
    count = 12 * 2**20 // (len(phrase) + 1)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": " ".join([phrase] * count)}) + '\n{"text": "small"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = cache_of(tmp_path / "x.jsonl", base, tmp_path / "c")
    grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    tokenizer = load_tokenizer(base)
    first, later = tokenizer(phrase)["input_ids"], tokenizer(f" {phrase}")["input_ids"]
    assert cache.meta["num_documents"] == 2
    expected = [*first, *later * (count - 1), cache.end_of_text_id]
    assert np.array_equal(cache.tokens[: cache.offsets[1]], expected)
    print(f"{len(expected):,} tokens, {grown_mib:.0f} MiB")
    assert grown_mib < 2000  # memory of the tokenizer for about three million tokens


def test_a_hundred_thousand_empty_documents_are_counted(tmp_path: Path, base: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n' * 100_000 + '{"text": "one"}\n')
    with pytest.raises(DataError, match=r"100000 of 100001 rows hold no usable text \(.*x.jsonl:1 is empty; "):
        cache_of(tmp_path / "x.jsonl", base, tmp_path / "c")
    assert cache_of(tmp_path / "x.jsonl", base, tmp_path / "c", max_bad_rows=1.0).meta["bad_rows"] == 100_000


# -- before the model's weights are loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", 3, "x.jsonl is empty (0 bytes)"),
        (b"\n\n", 3, "holds no usable document"),
        (b'{"text": "one"}\n{"text": "two"}\n', 3, "training tokens, one step needs"),
        (b'{"meta": {"text": "nested"}, "txet": "x"}\n', 2, "column 'text' not in"),
    ],
)
def test_unusable_data_is_an_error_before_the_weights_are_loaded(
    train_flags: list[str], base: Path, tmp_path: Path, content: bytes, code: int, words: str
) -> None:
    """The weight file has only zeros, so loading it would be another error."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    weights = model / "model.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    (tmp_path / "x.jsonl").write_bytes(content)
    result = train(*train_flags, "--model_name_or_path", model, "--dataset_name", tmp_path / "x.jsonl")
    assert result.returncode == code, result.stderr
    assert words in result.stderr
    assert [line[:7] for line in result.stderr.splitlines()].count("error: ") == 1

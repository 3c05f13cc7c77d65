"""Names for --datasets, and how rows become documents."""

import re
from pathlib import Path

import pytest

from flare.data.sources.base import SourceSpec
from flare.errors import ConfigError, DataError
from flare.evaluation.datasets import held_out, join_pages, load_texts, parse_name
from flare.evaluation.options import resolve_settings
from tests.evaluation.models import write_rows


def test_wikitext_lines_are_joined_into_pages() -> None:
    first = [" = First = \n", " \n", " text . \n", " = = Section = = \n", " more . \n"]
    lines = [" \n", *first, " = Second = \n", " x \n"]
    pages = list(join_pages(iter(lines)))
    assert pages == ["".join(lines[1:6]), "".join(lines[6:])]


def test_rows_without_text_are_skipped_in_wikitext_and_lambada(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A null row of WikiText is not a line "None"; a blank one is part of its page."""
    page = [" = One = \n", " \n", " text . \n"]
    wiki = write_rows(tmp_path / "wiki.jsonl", *page[:2], None, page[2], 7, " = Two = \n", " \ud800 \n", " y \n")
    passages = write_rows(tmp_path / "words.jsonl", "a passage and its end", "word", "ends in a space ", None)
    with caplog.at_level("WARNING", logger="flare"):
        assert load_texts(parse_name(f"wikitext2={wiki}", None), None) == ["".join(page), " = Two = \n y \n"]
        assert load_texts(parse_name(f"lambada={passages}", None), None) == ["a passage and its end"]
    logged = caplog.text.replace(f"{tmp_path}/", "")
    assert (
        "wikitext2: left out 3 rows without usable text (wiki.jsonl:3 is null; wiki.jsonl:5 is int, not text" in logged
    )
    assert "lambada: left out 3 rows without usable text (words.jsonl:2 has no last word" in logged
    nothing = write_rows(tmp_path / "nothing.jsonl", "没有空格")
    with pytest.raises(DataError, match="holds no document, 1 rows without usable text"):
        load_texts(parse_name(f"lambada={nothing}", None), None)


def test_wikitext_in_one_text_file_is_split_into_pages(tmp_path: Path) -> None:
    pages = [" = One = \n \n text \u2028 . \n", " = Two = \n x . \n"]
    (tmp_path / "wiki.txt").write_text(" \n" + "".join(pages), encoding="utf-8")
    assert load_texts(parse_name(f"wikitext2={tmp_path}/wiki.txt", None), None) == pages


def test_local_copy_replaces_the_default_data_set() -> None:
    flags = ["--model_path", "m", "--output_dir", "o", "--use_default_datasets", "--datasets", "lambada=x.jsonl"]
    assert resolve_settings(flags).datasets == ("wikitext2", "c4", "pg19", "lambada=x.jsonl")


def test_hub_names_contain_config_split_and_column() -> None:
    spec = parse_name("owner/set:en:validation:body", None).spec
    assert (spec.dataset_name, spec.dataset_config, spec.dataset_split, spec.text_column) == (
        "owner/set", "en", "validation", "body",
    )  # fmt: skip
    for local in ("corpus/*.txt", "corpus/x.jsonl.gz", "a[bc].csv"):
        assert parse_name(local, None).spec == SourceSpec(local)
    with pytest.raises(ConfigError, match="known sets: wikitext2"):
        parse_name("wikitext3", None)
    for word, words in (("lambada=", "give a file after the ="), ("a/b:c:d:e:f", "more parts than")):
        with pytest.raises(ConfigError, match=words):
            parse_name(word, None)


def test_errors_name_the_options_of_evaluation(tmp_path: Path) -> None:
    """Training's options for a data set and its column do not exist here."""
    (tmp_path / "body.jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "notes.md").write_text("no data")
    for name, words in (
        (
            "body.jsonl",
            "columns: body; a file must have this column; for a hub data set, owner/name:config:split:COLUMN",
        ),
        ("notes.md", f"--datasets {tmp_path}/notes.md: cannot read 'notes.md'"),
        ("*.csv", f"--datasets {tmp_path}/*.csv: matches no file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)) as raised:
            load_texts(parse_name(str(tmp_path / name), None), None)
        assert "--dataset_name" not in str(raised.value)
        assert "--text_column" not in str(raised.value)


def test_rows_without_text_are_skipped_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("flare.evaluation.datasets.log.warning", warnings.append)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": null}\n{"text": "one"}\n{"text": "\xff"}\n')
    left_out = f"2 rows without usable text ({file}:1 is null; {file}:3 is not UTF-8 (byte 10))"
    assert load_texts(parse_name(str(file), None), None) == ["one"]
    assert warnings == [f"data set {file}: left out {left_out}"]
    file.write_bytes(b'{"text": null}\n')
    with pytest.raises(DataError, match=re.escape(f"holds no document, 1 rows without usable text ({file}:1 is")):
        load_texts(parse_name(str(file), None), None)


@pytest.mark.slow
def test_embedded_evaluation_uses_only_held_out_documents(tmp_path: Path) -> None:
    import numpy as np

    from flare.data.sources.documents import text_hash
    from flare.data.sources.embedded import embedded_documents
    from flare.data.validation_split import split_documents

    texts = [text for _, text in embedded_documents(tmp_path)]
    train, _ = split_documents(np.array([text_hash(t) for t in texts], dtype=np.uint64), 5)
    assert not {texts[i] for i in train} & set(held_out(texts))

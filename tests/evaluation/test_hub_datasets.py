"""Known data sets in the layout of the hub, read from a local mirror."""

import gzip
import json
from pathlib import Path

import pytest

from flare.evaluation.datasets import load_texts, parse_name
from tests.evaluation.models import PROSE
from tests.processes import run_script

TEXTS = [PROSE * n for n in (3, 1, 2, 5)]


def write_parquet(path: Path, **columns: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def dataset_card(directory: Path, config: str, split: str, path: str) -> None:
    """A data set card, which says where configurations have their files."""
    lines = [
        "---",
        "configs:",
        f"- config_name: {config}",
        "  data_files:",
        f"  - split: {split}",
        f"    path: {path}",
        "---",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n")


WIKI = ["", " = One = \n", "", " First text . \n", " = = Part = = \n", " More . \n", " = Two = \n", " Second . \n"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets with the hub's names, layout and columns."""
    root = tmp_path_factory.mktemp("mirror")
    write_parquet(root / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", text=WIKI)
    dataset_card(root / "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "wikitext-2-raw-v1/test-*")
    c4 = root / "allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    c4.parent.mkdir(parents=True)
    with gzip.open(c4, "wt", encoding="utf-8") as file:
        for text in TEXTS:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"}) + "\n")
    dataset_card(root / "allenai/c4", "en", "validation", "en/c4-validation.*.json.gz")
    words = [f"{PROSE.strip()} and so it ended", "nobody knew the end"]
    write_parquet(root / "EleutherAI/lambada_openai/default/test-00000-of-00001.parquet", text=words)
    dataset_card(root / "EleutherAI/lambada_openai", "default", "test", "default/test-*")
    books = {"short_book_title": ["A", "B"], "publication_date": [1900, 1910], "url": ["u", "v"], "text": TEXTS[:2]}
    write_parquet(root / "emozilla/pg19-test/data/test-00000-of-00001-abc.parquet", **books)
    return root


def test_known_data_sets_are_read_in_the_layout_of_the_hub(mirror: Path, tmp_path: Path):
    def texts(name: str, limit: int | None = None) -> list[str]:
        return load_texts(parse_name(name, str(tmp_path)), limit, str(mirror))

    assert texts("wikitext2") == ["".join(WIKI[:6]), "".join(WIKI[6:])]
    assert texts("c4") == TEXTS and texts("c4", 2) == TEXTS[:2]
    assert texts("pg19") == TEXTS[:2]
    assert len(texts("lambada")) == 2 and parse_name("lambada", None).is_lambada


@pytest.mark.slow
def test_default_data_sets_from_a_mirror_with_one_missing(base_model: Path, mirror: Path, tmp_path: Path):
    """Offline: a data set that the mirror lacks is requested from the hub and fails; the others are evaluated."""
    (mirror / "EleutherAI").rename(mirror / "away")
    try:
        result = run_script(
            "evaluate_model_enhanced.py", "--model_path", base_model, "--use_default_datasets",
            "--data_mirror", mirror, "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out", "--device", "cpu", "--max_length", 64,
            "--min_tokens", 40, "--generate_tokens", 0,
        )  # fmt: skip
    finally:
        (mirror / "away").rename(mirror / "EleutherAI")
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "wikitext2": "ok", "c4": "ok", "lambada": "failed", "pg19": "ok",
    }  # fmt: skip
    assert "lambada" in entries["lambada"]["error"]
    assert "Not scored" in (tmp_path / "out" / "evaluation_report.md").read_text()


def test_empty_data_set_is_an_error_and_never_nan(base_model: Path, documents: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "small.jsonl").write_text('{"text": "a few words"}\n')
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--device", "cpu", "--output_dir", tmp_path / "out",
        "--datasets", tmp_path / "empty.jsonl", tmp_path / "small.jsonl", documents, "--min_tokens", 100,
    )  # fmt: skip
    assert result.returncode == 3
    text = (tmp_path / "out" / "evaluation_results.json").read_text()
    entries = list(json.loads(text)["datasets"].values())
    assert sorted(entry["status"] for entry in entries) == ["failed", "failed", "ok"]
    assert "NaN" not in text and "holds no document" in text and "at least 100 are needed" in text

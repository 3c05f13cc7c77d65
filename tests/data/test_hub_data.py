"""Hub data sets, read with the real client from a local server that answers like the hub."""

import gzip
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import add_revision, commit_of, serve
from tests.processes import REPO, script_environment

READ = """
import json, sys
from pathlib import Path
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.streaming.pieces import streamed_facts, streamed_identity
from flare.errors import run_script
from flare.logs import start_logging

def main():
    start_logging()
    spec = SourceSpec(**json.loads(sys.argv[1]))
    source = open_source(spec, Path("."))
    facts = streamed_facts(source) if spec.streaming else source.describe()
    identity = streamed_identity(facts) if spec.streaming else source.fingerprint()
    rows = list(source.rows())
    print(json.dumps([identity, [row.value for row in rows], rows[0].where, facts]))
    return 0

sys.exit(run_script(main))
"""


def lines(*texts: str, column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    with serve(tmp_path / "served") as (url, requests):
        yield tmp_path / "served", url, requests


def read(tmp_path: Path, url: str, name: str, offline: bool = False, **spec: object) -> subprocess.CompletedProcess:
    environment = script_environment(
        HF_ENDPOINT=url, HF_HUB_OFFLINE=str(int(offline)), HF_HOME=str(tmp_path / "hf"), PYTHONPATH=str(REPO)
    )
    for name_ in ("HF_DATASETS_OFFLINE", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name_, None)
    command = [sys.executable, "-c", READ, json.dumps({"dataset_name": name} | spec)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)


def answer(result: subprocess.CompletedProcess) -> tuple[str, list[str], str, dict]:
    assert result.returncode == 0, result.stderr
    return tuple(json.loads(result.stdout))


def error(result: subprocess.CompletedProcess, code: int) -> str:
    assert result.returncode == code, (result.returncode, result.stderr)
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_data_set_of_a_mirror_is_the_same_when_read_again_offline(tmp_path: Path, hub: tuple) -> None:
    root, url, requests = hub
    files = {"README.md": b"# News", "data/train.jsonl": lines("a", "b"), "data/test.jsonl": lines("c")}
    add_revision(root, "datasets/lab/news", "main", files)
    first = answer(read(tmp_path, url, "lab/news"))
    assert first[1:3] == (["a", "b"], "lab/news[0]")
    assert answer(read(tmp_path, url, "lab/news", dataset_split="test"))[1] == ["c"]
    before = len(requests)
    assert answer(read(tmp_path, url, "lab/news", offline=True)) == first
    assert len(requests) == before  # offline, no request was sent


@pytest.mark.slow
def test_revisions_are_distinguished_online_and_offline(tmp_path: Path, hub: tuple) -> None:
    root, url, _ = hub
    old = add_revision(root, "datasets/lab/news", "v1", {"README.md": b"# 1", "train.jsonl": lines("old")})
    new = add_revision(root, "datasets/lab/news", "main", {"README.md": b"# 2", "train.jsonl": lines("new")})
    tagged = answer(read(tmp_path, url, "lab/news", dataset_revision="v1"))
    assert tagged[1] == ["old"]
    assert answer(read(tmp_path, url, "lab/news", dataset_revision=old)) == tagged
    assert old in tagged[3]["content"]
    assert answer(read(tmp_path, url, "lab/news"))[1] == ["new"]  # the newest cached commit from now on
    assert answer(read(tmp_path, url, "lab/news", offline=True, dataset_revision=new))[1] == ["new"]
    assert answer(read(tmp_path, url, "lab/news", offline=True, dataset_revision="v1"))[1] == ["old"]
    assert "v9: data set 'lab/news' has no such revision" in error(
        read(tmp_path, url, "lab/news", dataset_revision="v9"), 2
    )
    assert "which commit of 'lab/news' that is" in error(
        read(tmp_path, url, "lab/news", offline=True, dataset_revision="v9"), 4
    )


@pytest.mark.slow
def test_a_streamed_data_set_of_a_mirror_is_identified_by_its_commit(tmp_path: Path, hub: tuple) -> None:
    root, url, _ = hub
    files = {"README.md": b"# 1", "train-0.jsonl": lines("a"), "train-1.jsonl": lines("b")}
    old = add_revision(root, "datasets/lab/news", "v1", files)
    first = answer(read(tmp_path, url, "lab/news", streaming=True, dataset_revision="v1"))
    assert first[1:3] == (["a", "b"], "lab/news shard 0[0]")
    add_revision(root, "datasets/lab/news", "main", files | {"train-1.jsonl": lines("c")})
    second = answer(read(tmp_path, url, "lab/news", streaming=True))
    assert second[1] == ["a", "c"]
    assert second[0] != first[0]
    assert answer(read(tmp_path, url, "lab/news", streaming=True, dataset_revision=old)) == first


def test_a_loading_script_is_replaced_by_the_hubs_parquet_copy(tmp_path: Path, hub: tuple) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["from", "parquet"]}), tmp_path / "0000.parquet")
    root, url, _ = hub
    repository = "datasets/lab/scripted"
    add_revision(root, repository, "main", {"README.md": b"# S", "scripted.py": b"raise SystemExit('ran')"})
    copy = {"default/train/0000.parquet": (tmp_path / "0000.parquet").read_bytes()}
    add_revision(root, repository, "refs/convert/parquet", copy)
    assert "is a loading script there" in error(read(tmp_path, url, "lab/scripted", dataset_revision="main"), 2)
    result = read(tmp_path, url, "lab/scripted")
    assert answer(result)[1] == ["from", "parquet"]
    assert "is a loading script, which is not run; uses the hub's parquet copy refs/convert/parquet" in result.stderr
    assert answer(read(tmp_path, url, "lab/scripted", offline=True)) == answer(result)


def test_data_that_the_hub_does_not_have_is_a_one_line_error(tmp_path: Path, hub: tuple) -> None:
    root, url, _ = hub
    add_revision(root, "datasets/lab/news", "main", {"README.md": b"# N", "train.jsonl": lines("a")})
    add_revision(root, "datasets/lab/broken", "main", {"README.md": b"# B", "train.jsonl": b'{"text": "a"}\n{"te'})
    add_revision(root, "datasets/lab/none", "main", {"README.md": b"# no data"})
    message = error(read(tmp_path, url, "lab/nothing"), 3)
    assert "hub has no such data set, or it is gated" in message
    assert "HF_ENDPOINT" in message
    assert "['train']" in error(read(tmp_path, url, "lab/news", dataset_split="dev"), 2)
    assert "did you mean 'text'" in error(read(tmp_path, url, "lab/news", text_column="txet"), 2)
    assert "lab/broken' cannot be read" in error(read(tmp_path, url, "lab/broken"), 3)
    assert "lab/none" in error(read(tmp_path, url, "lab/none"), 3)


def test_without_the_hub_the_error_lists_cached_data_sets_and_fixes(tmp_path: Path, hub: tuple) -> None:
    root, url, _ = hub
    add_revision(root, "datasets/lab/news", "main", {"README.md": b"# N", "train.jsonl": lines("a")})
    assert answer(read(tmp_path, url, "lab/news"))[1] == ["a"]
    message = error(read(tmp_path, url, "lab/other", offline=True), 4)
    for words in ("HF_ENDPOINT", "HF_HUB_OFFLINE=1", "local files", "cached data sets: lab/news"):
        assert words in message


@pytest.mark.slow  # the hub's client retries for half a minute
def test_a_hub_that_refuses_connections_is_a_one_line_error(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening
        message = error(read(tmp_path, f"http://127.0.0.1:{closed.getsockname()[1]}", "lab/other"), 4)
    for words in ("HF_ENDPOINT", "HF_HUB_OFFLINE=1", "local files", "cached data sets: none"):
        assert words in message


SNAPSHOT = {
    "README.md": b"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/a.jsonl\n"
    b"  - split: test\n    path: en/b.jsonl\n- config_name: de\n  data_files:\n  - split: train\n"
    b"    path: de/*.jsonl.gz\n---\n# News\n",
    "en/a.jsonl": lines("one", "two"),
    "en/b.jsonl": lines("three"),
    "de/c.jsonl.gz": gzip.compress(lines("eins")),
}


def write_snapshot(folder: Path) -> Path:
    for name, content in SNAPSHOT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_hub_snapshot_has_configurations_and_splits_offline(tmp_path: Path) -> None:
    folder = str(write_snapshot(tmp_path / "clone"))
    english = answer(read(tmp_path, "http://127.0.0.1:9", folder, offline=True, dataset_config="en"))
    assert english[1] == ["one", "two"]
    assert english[2].endswith("en/a.jsonl:1")
    spec = {"dataset_config": "en", "dataset_split": "test"}
    assert answer(read(tmp_path, "http://127.0.0.1:9", folder, offline=True, **spec))[1] == ["three"]
    assert answer(read(tmp_path, "http://127.0.0.1:9", folder, offline=True, dataset_config="de"))[1] == ["eins"]
    spec["dataset_split"] = "dev"
    assert "has the splits train, test" in error(read(tmp_path, "http://127.0.0.1:9", folder, offline=True, **spec), 2)
    spec["dataset_config"] = "fr"
    assert "'en', 'de'" in error(read(tmp_path, "http://127.0.0.1:9", folder, offline=True, **spec), 2)
    moved = str((tmp_path / "clone").rename(tmp_path / "moved"))
    (tmp_path / "moved" / "en" / "a.jsonl").touch()
    again = answer(read(tmp_path, "http://127.0.0.1:9", moved, offline=True, dataset_config="en"))
    assert again[0] == english[0]  # the same bytes in another place, with another timestamp


def test_all_files_next_to_a_loading_script_are_read(tmp_path: Path) -> None:
    """The layout of RedPajama's sample after ``hf download --local-dir``."""
    folder = tmp_path / "scripted"
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "scripted.py").write_text("raise SystemExit('ran')")
    (folder / "a.jsonl").write_bytes(lines("one"))
    (folder / "b.jsonl").write_bytes(lines("two"))
    result = read(tmp_path, "http://127.0.0.1:9", str(folder), offline=True)
    assert answer(result)[1] == ["one", "two"]
    assert "scripted is a loading script, which is not run; reads the 2 files next to it" in result.stderr
    refused = read(tmp_path, "http://127.0.0.1:9", str(folder), offline=True, dataset_split="test")
    assert "leave out --dataset_config and --dataset_split" in error(refused, 2)


def test_a_download_in_the_hubs_cache_is_found_by_its_name_offline(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "hf" / "hub" / "datasets--lab--news"
    write_snapshot(repository / "snapshots" / commit)
    for file in list((repository / "snapshots").rglob("*.*")):
        if file.is_file():  # the cache has links to blobs without a suffix
            blob = repository / "blobs" / commit_of(str(file))
            blob.parent.mkdir(exist_ok=True)
            file.rename(blob)
            file.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    result = read(tmp_path, "http://127.0.0.1:9", "lab/news", offline=True, dataset_config="en")
    assert answer(result)[1] == ["one", "two"]
    assert "reads its cached snapshot" in result.stderr
    streamed = read(tmp_path, "http://127.0.0.1:9", "lab/news", offline=True, dataset_config="de", streaming=True)
    assert answer(streamed)[1] == ["eins"]

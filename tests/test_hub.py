"""Hub names, through the hub's own client and data sets library, against local copies of their layout."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from flare.data.sources.base import SourceSpec
from flare.data.sources.hub import HubSource
from flare.errors import CheckpointError, ConfigError, EnvError
from flare.hub import local_model_dir, read_hub_config, read_model_config
from tests.conftest import write_corpus
from tests.fake_hub import add_revision, serve
from tests.processes import script_environment, train_in_new_process

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub_cache(tmp_path: Path, base: Path) -> Path:
    """The hub's cache as it is after a download of Qwen/Tiny."""
    repository = tmp_path / "hub" / "models--Qwen--Tiny"
    shutil.copytree(base, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "hub"


def test_hub_model_is_found_in_the_cache_without_a_network(hub_cache: Path, monkeypatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    directory = local_model_dir("Qwen/Tiny", str(hub_cache))
    assert (directory / "model.safetensors").is_file()
    assert read_hub_config("Qwen/Tiny", str(hub_cache))["model_type"] == "qwen2"
    monkeypatch.setenv("HOME", str(hub_cache.parent))
    for cache_dir in (str(hub_cache), "~/hub"):
        with pytest.raises(EnvError, match=r"unset HF_HUB_OFFLINE; cached models: .*Qwen/Tiny"):
            local_model_dir("Qwen/Other", cache_dir)
    with pytest.raises(EnvError, match="cached models: none"):
        local_model_dir("Qwen/Other", "~/elsewhere")


def test_a_disk_that_takes_no_download_is_not_called_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def read_only(*_: object, **__: object) -> None:
        raise RuntimeError("failed") from OSError(errno.EROFS, "Read-only file system", "/cache/x")

    for fails, words in ((full, ": No space left on device"), (read_only, " in /cache/x: Read-only file system")):
        monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
        monkeypatch.setattr("datasets.load_dataset", fails)
        for what, load in (
            ("model 'lab/tiny'", lambda: local_model_dir("lab/tiny")),
            ("data set 'lab/news'", lambda: HubSource(SourceSpec("lab/news"))),
        ):
            with pytest.raises(EnvError) as raised:
                load()
            assert str(raised.value).startswith(f"{what} cannot be stored{words}; --cache_dir and the environment's")


def test_a_repository_without_a_configuration_is_reported(tmp_path: Path, train_flags: list[str]) -> None:
    """As one of .gguf files only."""
    add_revision(tmp_path / "served", "models/lab/gguf", "main", {"model.gguf": b"GGUF"})
    with serve(tmp_path / "served") as (url, _):
        environment = script_environment(HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hf"))
        environment.pop("HF_HUB_CACHE", None)
        flags = [*train_flags, "--model_name_or_path", "lab/gguf", "--dry_run"]
        result = train_in_new_process(*flags, env=environment)
    assert result.returncode == 2
    assert "error: model 'lab/gguf' has no config.json on the hub" in result.stderr


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c", "plain"])
def test_what_can_be_no_hub_name_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a directory; give a directory or a hub name"):
        local_model_dir(name)


def test_experiment_directory_instead_of_its_final_model_is_reported(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run" / "final_model")
    with pytest.raises(CheckpointError, match=r"not a model directory; did you mean .*/run/final_model\?"):
        read_model_config(tmp_path / "run")


def test_training_starts_from_a_cached_hub_model(train_flags: list[str], hub_cache: Path) -> None:
    flags = [*train_flags, "--model_name_or_path", "Qwen/Tiny", "--cache_dir", hub_cache, "--max_steps", 1]
    result = train_in_new_process(*flags)
    assert result.returncode == 0, result.stderr


def test_unreachable_data_set_is_one_line_that_names_the_ways_out(train_flags: list[str], tmp_path: Path) -> None:
    environment = script_environment(HF_DATASETS_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    result = train_in_new_process(*train_flags, "--dataset_name", "nobody/nothing", env=environment)
    assert result.returncode in (3, 4)
    assert result.stderr.count("\n") == 1
    assert "HF_ENDPOINT" in result.stderr
    assert "local files" in result.stderr


def test_hub_rows_come_from_the_named_split_and_column(tmp_path: Path, monkeypatch) -> None:
    """datasets reads a folder of that name as it reads a repository of that layout."""
    folder = tmp_path / "owner" / "set"
    folder.mkdir(parents=True)
    write_corpus(folder / "train.jsonl", 7, column="body")
    write_corpus(folder / "test.jsonl", 3, seed=1, column="body")
    monkeypatch.chdir(tmp_path)
    spec = SourceSpec("owner/set", "body", dataset_split="test", cache_dir=str(tmp_path / "cache"))
    texts = [row.value for row in HubSource(spec).rows()]
    assert texts == [json.loads(line)["body"] for line in (folder / "test.jsonl").read_text().splitlines()]
    assert HubSource(spec).fingerprint() == HubSource(spec).fingerprint()
    with pytest.raises(ConfigError, match=r"column 'text' not in owner/set; columns: .*body"):
        HubSource(SourceSpec("owner/set", cache_dir=str(tmp_path / "cache")))

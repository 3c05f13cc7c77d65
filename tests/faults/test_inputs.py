"""Models, tokenizers, data and settings that are not what they should be (rows 16-23, 26, 34, 35, 41, 45)."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import write_corpus
from tests.faults.harness import digest, stage
from tests.processes import REPO, Ended, Zygote, script_environment


def refused(ended: Ended, code: int, *words: str) -> None:
    """One line, with these words; oracle (e) was checked already."""
    assert ended.returncode == code, ended.stderr
    (error,) = ended.errors
    for word in words:
        assert word in error


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model to damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the model -------------------------------------------------------------------------------------------------------


def drop_a_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def name_a_missing_shard(model: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00003.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (lambda m: os.truncate(m / "model.safetensors", 5000), "cannot be loaded"),
    "empty": (lambda m: os.truncate(m / "model.safetensors", 0), "cannot be loaded"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no weights"),
    "missing shard": (name_a_missing_shard, "shard model-00002-of-00003.safetensors is missing"),
    "missing tensor": (drop_a_tensor, "missing tensors (first: model.layers.2.self_attn.q_proj.weight"),
    "more layers": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=5, layer_types=["full_attention"] * 5),
        "missing tensors (first: model.layers.4",
    ),
    "foreign code": (
        lambda m: edit_json(m / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}),
        "wants to run its own code",
    ),
    "another family": (lambda m: edit_json(m / "config.json", model_type="llama"), "'llama' model; supported: qwen2"),
    "config cut": (lambda m: os.truncate(m / "config.json", 20), "cannot be read"),
}


@pytest.mark.faults
@pytest.mark.parametrize("damage", MODELS)
def test_a_damaged_model_is_refused_by_name(
    zygote: Zygote, flags: list[str], run: Path, model: Path, damage: str
) -> None:
    """Rows 16 and 17; stdin is closed, so no question can be asked."""
    change, words = MODELS[damage]
    change(model)
    refused(zygote.run(*flags, "--model_name_or_path", model), 2, words, str(model))
    assert not list(run.glob("checkpoints/*"))


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(
    zygote: Zygote, flags: list[str], model: Path
) -> None:
    """Row 18."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"].values(), default=0)
    last = max([last, *(token["id"] for token in tokenizer["added_tokens"])])
    special = tokenizer["added_tokens"][0]
    extra = [special | {"id": last + 1 + i, "content": f"<|extra{i}|>"} for i in range(400)]
    tokenizer["added_tokens"] += extra
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(zygote.run(*flags, "--model_name_or_path", model), 2, "ids but the embedding 304 rows")


def test_an_embedding_larger_than_the_tokenizer_stays_as_large(zygote: Zygote, flags: list[str], run: Path) -> None:
    """Row 18: Qwen's 151,665 ids and 151,936 rows; here 300 and 304."""
    assert zygote.run(*flags, "--max_steps", 1).returncode == 0
    with safe_open(run / "final_model" / "model.safetensors", "pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape()[0] == 304


# -- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_a_huge_document_and_many_empty_ones_are_packed(zygote: Zygote, flags: list[str], tmp_path: Path) -> None:
    """Row 20."""
    with open(tmp_path / "odd.jsonl", "w") as file:
        file.write(json.dumps({"text": "the model of rope " * 50_000}) + "\n")
        file.write('{"text": ""}\n' * 20_000)
        file.writelines(json.dumps({"text": f"{i} token data"}) + "\n" for i in range(50))
    flags = [*flags, "--cache_dir", str(tmp_path / "cache"), "--max_bad_rows", "1.0"]
    flags += ["--max_eval_samples", "4"]  # the huge document may be held out
    ended = zygote.run(*flags, "--dataset_name", tmp_path / "odd.jsonl", "--max_steps", 2)
    assert ended.returncode == 0, ended.stderr


DATA = {
    "missing": (None, "no such file"),
    "empty": ("", "is empty"),
    "another column": ('{"content": "x", "id": 1}\n', "content"),
    "too little": ('{"text": "the model"}\n{"text": "rope of layers"}\n', "tokens"),
}


@pytest.mark.faults
@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used_ends_in_one_line(
    zygote: Zygote, flags: list[str], tmp_path: Path, case: str
) -> None:
    """Rows 21 and 22."""
    text, words = DATA[case]
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    ended = zygote.run(*flags, "--dataset_name", path, "--cache_dir", tmp_path / "cache")
    assert ended.returncode in (2, 3), ended.stderr
    (error,) = ended.errors
    assert words in error


@pytest.mark.faults
@pytest.mark.parametrize("change", ["row added", "order", "touched"])
def test_changed_data_is_not_resumed_with(
    zygote: Zygote, flags: list[str], uninterrupted: Path, run: Path, tmp_path: Path, change: str
) -> None:
    """Row 23: what counts is the content."""
    data = write_corpus(tmp_path / "data.jsonl")
    flags = [*flags, "--dataset_name", str(data)]
    assert zygote.run(*flags, fault=("die_at_step", 6)).returncode == -9
    lines = data.read_text().splitlines(keepends=True)
    if change == "row added":
        data.write_text("".join([*lines, '{"text": "one more"}\n']))
    elif change == "order":
        data.write_text("".join(reversed(lines)))
    else:
        os.utime(data, (0, 0))
    ended = zygote.run(*flags)
    if change == "touched":
        assert ended.returncode == 0, ended.stderr
        assert digest(run / "final_model") == digest(uninterrupted / "final_model")
    else:
        refused(ended, 2, "data")


# -- what was there before -------------------------------------------------------------------------------------------


def test_a_finished_experiment_started_again_changes_nothing(
    zygote: Zygote, flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """Row 26."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "out" / "run"))
    before = {p: p.stat().st_mtime_ns for p in (run / "final_model").iterdir()}
    ended = zygote.run(*flags)
    assert ended.returncode == 0
    assert "finished already" in ended.stderr
    assert {p: p.stat().st_mtime_ns for p in (run / "final_model").iterdir()} == before


def test_changed_settings_are_named_at_resume(
    zygote: Zygote, flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    """Row 34: applied and named, or refused."""
    run = Path(shutil.copytree(uninterrupted, tmp_path / "out" / "run"))
    changes = ("--learning_rate", "5e-4", "--lr_scheduler_type", "constant", "--save_steps", 3, "--max_steps", 10)
    ended = zygote.run(*flags, *changes)
    assert ended.returncode == 0, ended.stderr
    line = next(line for line in ended.stderr.splitlines() if line.startswith("resumes with changes: "))
    for name in ("learning_rate 0.001 -> 0.0005", "lr_scheduler_type", "save_steps 2 -> 3", "max_steps 8 -> 10"):
        assert name in line
    assert stage(run)["history"][-1]["step"] == 10
    refused(zygote.run(*flags, "--seed", 7, "--max_steps", 12), 2, "seed: 42 -> 7")


def test_adam_moments_never_cross_to_other_layers(
    zygote: Zygote, flags: list[str], uninterrupted: Path, run: Path, tmp_path: Path
) -> None:
    """Row 35: layers of equal shape. The state goes by name, and another stage begins a new one."""
    Path(shutil.copytree(uninterrupted, tmp_path / "out" / "run"))
    ended = zygote.run(*flags, "--train_layers", 0, 2, "--max_steps", 10)
    refused(ended, 2, "train_layers")
    at = flags.index("--model_name_or_path")
    stage2 = [*flags[:at], *flags[at + 2 : flags.index("--no_rope_layers")], "--stage", "2", "--max_steps", "2"]
    ended = zygote.run(*stage2, "--train_layers", "0", "2")
    assert ended.returncode == 0, ended.stderr
    state = load_file(run / "checkpoints" / "checkpoint-2" / "optimizer.safetensors")
    layers = {name.split("model.layers.")[1].split(".")[0] for name in state if "model.layers." in name}
    assert layers == {"0", "2"}
    steps = [tensor for name, tensor in state.items() if name.endswith("step")]
    assert steps
    assert all(torch.equal(step, torch.full_like(step, 2)) for step in steps)
    assert digest(run / "stage1" / "final_model") == digest(uninterrupted / "final_model")


# -- names, streams, secrets -----------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("name", ["two words", "'quoted' \"twice\"", "实验 äöü", "$HOME `x`", "x" * 200])
def test_odd_names_work(zygote: Zygote, flags: list[str], tmp_path: Path, name: str) -> None:
    """Row 41; test_runs.py pastes the recorded command back."""
    ended = zygote.run(*flags, "--experiment_name", name, "--max_steps", 1)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out" / name / "final_model" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["../out2", "/absolute", "new\nline", "nul\0", "", ".", "x" * 300])
def test_names_that_leave_the_directory_are_refused(
    zygote: Zygote, flags: list[str], tmp_path: Path, name: str
) -> None:
    refused(zygote.run(*flags, "--experiment_name", name), 2, "--experiment_name")
    assert not (tmp_path / "out").exists()


def test_odd_text_in_the_log_is_utf_8_whatever_the_locale(
    zygote: Zygote, flags: list[str], run: Path, tmp_path: Path
) -> None:
    """Row 45."""
    with open(tmp_path / "odd.jsonl", "w", encoding="utf-8") as file:
        for i in range(300):
            file.write(json.dumps({"text": f"{i} 中文 \x1b[31m rot \0 " + "model " * 30}) + "\n")
    flags = [*flags, "--cache_dir", str(tmp_path / "cache"), "--dataset_name", str(tmp_path / "odd.jsonl")]
    ended = zygote.run(*flags, "--max_steps", 1, LANG="C", LC_ALL="C", PYTHONUTF8="0")
    assert ended.returncode == 0, ended.stderr
    (run / "training.log").read_text(encoding="utf-8")


@pytest.mark.faults
@pytest.mark.parametrize("reader", ["| head -n 1", ">&- 2>&-"], ids=["a pipe that ends", "closed"])
def test_a_terminal_that_goes_away_does_not_end_the_run(flags: list[str], run: Path, reader: str) -> None:
    """Row 45: stdout and stderr of a pipe whose reader has gone, or of none."""
    command = shlex.join([sys.executable, str(REPO / "train_qwen_multi_gpu.py"), *flags])
    pipeline = f"set -o pipefail; {command} 2>&1 {reader}"
    ended = subprocess.run(["bash", "-c", pipeline], env=script_environment(), capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert stage(run)["status"] == "finished"
    assert "finished stage 1" in (run / "training.log").read_text(encoding="utf-8")


SECRETS = {
    "HF_TOKEN": "hf_sEcReT1", "HUGGING_FACE_HUB_TOKEN": "hf_sEcReT2", "FLARE_API_KEY": "sEcReT3",
    "NCCL_PASSWORD": "sEcReT4", "WANDB_API_KEY": "sEcReT5", "AWS_SECRET_ACCESS_KEY": "sEcReT6",
    "HF_ENDPOINT": "https://user:sEcReT7@mirror.example", "HTTPS_PROXY": "http://user:sEcReT8@proxy.example:3128",
}  # fmt: skip


def test_no_secret_of_the_environment_is_written(zygote: Zygote, flags: list[str], run: Path, tmp_path: Path) -> None:
    ended = zygote.run(*flags, "--max_steps", 2, **SECRETS)
    assert ended.returncode == 0, ended.stderr
    found = [f for f in run.rglob("*") if f.is_file() and b"sEcReT" in f.read_bytes()]
    assert found == []
    assert "sEcReT" not in ended.stderr + ended.stdout
    assert "HF_ENDPOINT" in (run / "environment_info.txt").read_text()

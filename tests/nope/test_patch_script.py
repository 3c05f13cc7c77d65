"""patch_qwen_rope.py: its modes, and what a checkpoint on disk must be before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import patch_qwen_rope as script
from flare.errors import CheckpointError, ConfigError, FlareError
from flare.nope.command_line import EXAMPLES
from flare.nope.export.export import restore_rope
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint
from flare.nope.tensor_names import tensor_names
from flare.nope.weight_files import read_header
from tests.conftest import write_base
from tests.processes import REPO, script_environment


def run(*flags: object) -> int:
    """The script's main, in this process; raises what the script would print as one line."""
    return script.main([str(flag) for flag in flags])


# -- modes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "patching .* needs --model_name_or_path"),
        ("--model_name_or_path X", "needs --output_dir"),
        ("--inspect X --verify Y", "--inspect and --verify exclude each other"),
        (
            "--export native --restore_rope --model_name_or_path X --output_dir Y",
            "--export and --restore_rope exclude",
        ),
        ("--inspect X --output_dir Y", "--inspect does not use --output_dir"),
        ("--verify X --rope_theta 5", "--verify does not use --rope_theta"),
        ("--export native --model_name_or_path X --output_dir Y --no_rope_layers 1", "does not use --no_rope_layers"),
        (
            "--restore_rope --model_name_or_path X --output_dir Y --nope_temperature 2",
            "does not use --nope_temperature",
        ),
        ("--export native --output_dir Y", "--export needs --model_name_or_path"),
        ("--export gguf", "--export must be one of native; got 'gguf'"),
        ("--model X", "unknown argument --model"),
        ("--rope_theta high", '--rope_theta must be a number, got the string "high"'),
        ("--verify missing_dir", "holds no config.json"),
    ],
)
def test_flags_without_effect_and_missing_ones_are_named(flags: str, words: str) -> None:
    with pytest.raises(FlareError, match=words) as caught:
        run(*flags.split())
    assert caught.value.exit_code == 2


def test_refresh_flag_replaces_the_modeling_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("--model_name_or_path", base, "--no_rope_layers", 1, "--output_dir", tmp_path / "patched") == 0
    (tmp_path / "patched" / "modeling_nope.py").write_text("# an older file\n")
    assert run("--refresh", tmp_path / "patched") == 0
    assert run("--refresh", tmp_path / "patched") == 0
    printed = capsys.readouterr().out
    assert printed.count("replaced by the current file") == 1
    assert printed.count("is already current") == 1


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, patch_qwen_rope; from flare.nope.command_line import build_parser\n"
        "build_parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, env=script_environment())


def test_the_examples_of_the_help_run_one_after_the_other(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in EXAMPLES.replace("\\\n", "").splitlines()[1:]:
        words = line.replace("Qwen/Qwen2.5-3B", str(base)).replace("20-32", "every:4").split()
        assert words[:2] == ["python", "patch_qwen_rope.py"]
        assert run(*words[2:]) == 0
    printed = capsys.readouterr().out
    assert "which are this model's" in printed  # what llama.cpp says of every:4
    assert "this is not the model that was trained" in printed
    assert AutoModelForCausalLM.from_pretrained("plain").config.model_type == "qwen2"


# -- what is refused before anything is written ------------------------------------------------------------------


@pytest.fixture
def sharded(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model in several shards."""
    shutil.copytree(base, tmp_path / "sharded")
    model = AutoModelForCausalLM.from_pretrained(base)
    (tmp_path / "sharded" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    return tmp_path / "sharded"


def delete_shard(directory: Path) -> None:
    sorted(directory.glob("*.safetensors"))[1].unlink()


def truncate_shard(directory: Path) -> None:
    shard = sorted(directory.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def truncate_header(directory: Path) -> None:
    os.truncate(sorted(directory.glob("*.safetensors"))[1], 50)


def cut_index(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    os.truncate(index, index.stat().st_size // 2)


def shorten_index(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    last = max(content["weight_map"].values())
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != last}
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (delete_shard, r"shard model-00002-of-\d+\.safetensors is missing"),
        (
            truncate_shard,
            r"model-00002-of-\d+\.safetensors is not a complete safetensors file: \d+ bytes instead of \d+",
        ),
        (truncate_header, "not a complete safetensors file: its header is cut off"),
        (cut_index, "is not an index of weight files"),
        (shorten_index, r"lacks \d+ of \d+ tensors .* is its index complete"),
    ],
)
def test_damaged_weights_are_named_before_anything_is_written(sharded: Path, damage, words: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=words):
        patch_checkpoint(sharded, sharded.parent / "out", [1])
    assert [p.name for p in sharded.parent.iterdir()] == ["sharded"]


def test_a_complete_sharded_model_is_used_with_its_index(sharded: Path) -> None:
    patch_checkpoint(sharded, sharded.parent / "out", [1])
    assert load_causal_lm(sharded.parent / "out").config.nope_layers == [1]


@pytest.mark.parametrize("inside", [".", "new", "a/b"])
def test_output_in_the_model_itself_is_refused(base: Path, inside: str) -> None:
    before = sorted(base.iterdir())
    with pytest.raises(ConfigError, match="is in the model's own directory"):
        patch_checkpoint(base, base / inside, [1])
    assert sorted(base.iterdir()) == before


def test_the_same_output_twice_is_refused_and_stays(base: Path, tmp_path: Path) -> None:
    patch_checkpoint(base, tmp_path / "out", [1])
    with pytest.raises(ConfigError, match="is not empty"):
        patch_checkpoint(base, tmp_path / "out", [2])
    assert load_causal_lm(tmp_path / "out").config.nope_layers == [1]


def test_restoring_a_plain_model_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to restore"):
        restore_rope(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("layers", "words"), [("2 2", "named twice"), ("1-9", "out of range"), ("3-1", "reversed"), ("none", "no layer")]
)
def test_layers_that_cannot_be_are_refused(base: Path, tmp_path: Path, layers: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run("--model_name_or_path", base, "--output_dir", tmp_path / "out", "--no_rope_layers", *layers.split())


@pytest.mark.parametrize("theta", ["0", "nan", "inf"])
def test_a_theta_that_cannot_be_is_refused(base: Path, tmp_path: Path, theta: str) -> None:
    with pytest.raises(ConfigError, match=r"--rope_theta must be (a number|> 0), got"):
        run("--model_name_or_path", base, "--output_dir", tmp_path / "out", "--rope_theta", theta)
    assert not (tmp_path / "out").exists()


def test_layer_types_with_sliding_windows_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    config = json.loads((base / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * 3 + ["sliding_attention"]
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"sliding-window attention \(layer_types\)"):
        patch_checkpoint(tmp_path / "copy", tmp_path / "out", [1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "does not contain a JSON object"),
        ("{", "cannot be read"),
        ('{"model_type": "qwen2"}', "num_hidden_layers must be a whole number above 0, config.json has None"),
        ('{"model_type": "qwen2", "num_hidden_layers": "4"}', "config.json has '4'"),
        ('{"model_type": "qwen2_nope", "num_hidden_layers": 4, "nope_layers": "1,3"}', "must be a list of layer"),
        ('{"model_type": "qwen2_nope", "num_hidden_layers": 4}', "qwen2_nope model, but nope_layers names no layer"),
    ],
)
@pytest.mark.parametrize("mode", ["patch", "inspect", "verify"])
def test_a_config_that_is_none_is_named(base: Path, tmp_path: Path, mode: str, text: str, words: str) -> None:
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_text(text)
    patch = ("--model_name_or_path", tmp_path / "copy", "--output_dir", tmp_path / "out")
    with pytest.raises(CheckpointError, match=words):
        run(*(patch if mode == "patch" else (f"--{mode}", tmp_path / "copy")))


# -- other weights -----------------------------------------------------------------------------------------------


def pickled(directory: Path, content: object) -> Path:
    """The model with its weights in pytorch_model.bin."""
    (directory / "model.safetensors").unlink()
    torch.save(content, directory / "pytorch_model.bin")
    return directory


def test_pickled_weights_are_linked_or_with_a_temperature_rewritten(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bin")
    source = pickled(tmp_path / "bin", load_file(base / "model.safetensors"))
    patch_checkpoint(source, tmp_path / "linked", [1])
    assert os.stat(tmp_path / "linked" / "pytorch_model.bin").st_nlink == 2
    patch_checkpoint(source, tmp_path / "scaled", [1], nope_temperature=2.0)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "scaled" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
    }


@pytest.mark.parametrize("prefix", ["", "base_model."])
def test_a_temperature_that_finds_no_queries_in_pickled_weights_is_an_error(
    base: Path, tmp_path: Path, prefix: str
) -> None:
    """Names of another model's making: config.json would record a factor that no weight has."""
    shutil.copytree(base, tmp_path / "bin")
    weights = {prefix + name.removeprefix("model."): t for name, t in load_file(base / "model.safetensors").items()}
    source = pickled(tmp_path / "bin", weights)
    with pytest.raises(CheckpointError, match=r"lacks 2 tensors .*: model\.layers\.1\.self_attn\.q_proj\.bias"):
        patch_checkpoint(source, tmp_path / "out", [1], nope_temperature=2.0)
    assert not (tmp_path / "out").exists()


class Evil:
    """Unpickling this would run a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.marker}'",)


def test_pickled_code_is_not_run(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "bin")
    source = pickled(tmp_path / "bin", {"model.norm.weight": Evil(tmp_path / "evil")})
    with pytest.raises(CheckpointError, match="cannot be read as a file of plain tensors"):
        patch_checkpoint(source, tmp_path / "out", [1], nope_temperature=2.0)
    assert not (tmp_path / "evil").exists()


def test_read_header_is_what_safetensors_reads(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    header = read_header(base / "model.safetensors")
    assert {name: entry["shape"] for name, entry in header.items()} == {n: list(t.shape) for n, t in tensors.items()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensor_names_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied} | ({"attention_bias": tied} if family == "qwen3" else {})
    directory = write_base(tmp_path / "base", family, **changes)
    config = json.loads((directory / "config.json").read_text())
    assert set(load_file(directory / "model.safetensors")) == tensor_names(family, config)


def test_models_whose_layers_no_config_names_load_unproven(tmp_path: Path) -> None:
    """GPT-2 as an evaluation's baseline: no RoPE, no module that the probe knows."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=1))
    model.save_pretrained(tmp_path / "gpt2")
    assert load_causal_lm(tmp_path / "gpt2").config.model_type == "gpt2"

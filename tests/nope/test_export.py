"""Native exports: stock transformers computes the same bits, and restoring RoPE returns the original."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flare.errors import CheckpointError, ConfigError, FlareError
from flare.hub import read_model_config
from flare.nope.export import export as export_module
from flare.nope.export.bit_equality import Comparison
from flare.nope.export.export import export_native, restore_rope
from flare.nope.export.native import to_native
from flare.nope.export.verify import verify_directory
from flare.nope.layers import format_layers
from flare.nope.load import load_causal_lm, load_tokenizer
from flare.nope.patch import patch_checkpoint
from flare.nope.probe import probe_nope_layers
from tests.conftest import write_base
from tests.processes import run_script, script_environment

ODD = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24, "num_hidden_layers": 6}


WIDE = {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 40, "head_dim": 16, "num_hidden_layers": 6}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6}


CASES = {
    "qwen2-tied": ("qwen2", ODD | {"tie_word_embeddings": True}),
    "qwen2-untied": ("qwen2", ODD | {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "pad_token_id": 3}),
    "qwen2-yarn": ("qwen2", ODD | {"rope_parameters": YARN}),
    "qwen2-bin": ("qwen2", ODD),
    "qwen3-tied": ("qwen3", WIDE | {"tie_word_embeddings": True}),
    "qwen3-untied": ("qwen3", WIDE | {"tie_word_embeddings": False, "rms_norm_eps": 1e-4}),
    "qwen3-sharded": ("qwen3", WIDE | {"rope_parameters": YARN}),
    "qwen3-bf16": ("qwen3", WIDE),
}


STOCK = """\
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
root, names = Path(sys.argv[1]), sys.argv[2:]
logits, generated = {}, {}
with torch.no_grad():
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(root / name / "export").eval()
        logits[name] = model(tokens).logits
        logits[name + " far"] = model(tokens[:1], position_ids=torch.arange(470, 510)[None]).logits
        text = tokens[:1, :8]
        cached = model.generate(text, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        for _ in range(12):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        generated[name] = torch.equal(text, cached)
assert not any(m.split(".")[0] == "flare" or "transformers_modules" in m for m in sys.modules)
save_file(logits, root / "stock.safetensors")
print(json.dumps(generated))
"""


@dataclass
class Family:
    """One model as plain, patched and exported directory."""

    base: Path
    patched: Path
    export: Path
    layers: list[int]


def to_bf16(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory).to(torch.bfloat16)
    model.save_pretrained(directory)


def to_bin(directory: Path) -> None:
    """As the guide's final models: one pickled file, the tied head in it twice."""
    weights = load_file(directory / "model.safetensors")
    torch.save({"lm_head.weight": weights["model.embed_tokens.weight"]} | weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def to_shards(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")


PREPARE = {"bf16": to_bf16, "bin": to_bin, "sharded": to_shards}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """Every case exported without the product's own comparison, which costs a process each; STOCK compares."""
    root = tmp_path_factory.mktemp("families")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "compare_with_export", lambda *_: Comparison(["none"], 0, 0))
        for seed, (name, (family, changes)) in enumerate(CASES.items()):
            base = write_base(root / name / "base", family, seed, **changes)
            PREPARE.get(name.split("-")[1], lambda _: None)(base)
            layers = sorted(random.Random(seed).sample(range(6), 1 + seed % 4))
            patch_checkpoint(base, root / name / "patched", layers)
            export_native(root / name / "patched", root / name / "export")
            found[name] = Family(base, root / name / "patched", root / name / "export", layers)
    return found


@pytest.fixture(scope="module")
def stock(families: dict[str, Family]) -> subprocess.CompletedProcess:
    """One process without this repository that opens every export with AutoModelForCausalLM."""
    root = families["qwen2-tied"].base.parent.parent
    (root / "stock.py").write_text(STOCK)
    command = [sys.executable, str(root / "stock.py"), str(root), *families]
    environment = script_environment(PYTHONPATH="", HF_HUB_DISABLE_PROGRESS_BARS="1")
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, env=environment)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_gives_the_bits_of_the_patched_model(
    families: dict[str, Family], stock: subprocess.CompletedProcess, name: str
) -> None:
    ours = load_causal_lm(families[name].patched)
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = load_file(families[name].base.parent.parent / "stock.safetensors")
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs[name])
        far = ours(tokens[:1], position_ids=torch.arange(470, 510)[None]).logits
        assert torch.equal(far, theirs[f"{name} far"])
        plain = load_causal_lm(families[name].base)(tokens).logits
    assert (plain - theirs[name]).abs().max() > 1e-3  # RoPE did matter


def test_stock_transformers_generates_with_cache_as_without(stock: subprocess.CompletedProcess) -> None:
    assert json.loads(stock.stdout) == dict.fromkeys(CASES, True)


def test_stock_transformers_has_nothing_to_say_about_the_weights(stock: subprocess.CompletedProcess) -> None:
    for word in ("missing", "unexpected", "newly initialized", "not used", "trust_remote_code"):
        assert word not in stock.stderr.lower(), stock.stderr


@pytest.mark.parametrize("name", CASES)
def test_probe_finds_the_exact_layers_on_every_form(families: dict[str, Family], name: str) -> None:
    family = families[name]
    for directory in (family.patched, family.export):
        assert verify_directory(directory)[0].startswith(f"NoPE layers found: {format_layers(family.layers)},")
        assert probe_nope_layers(load_causal_lm(directory)) == family.layers
    assert verify_directory(family.base)[0].startswith("NoPE layers found: none")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["patched", "export"])
def test_restored_model_is_bitwise_the_plain_one(
    families: dict[str, Family], tmp_path: Path, name: str, form: str
) -> None:
    family = families[name]
    restore_rope(getattr(family, form), tmp_path / "plain")
    tokens = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(2))
    restored, plain = load_causal_lm(tmp_path / "plain"), load_causal_lm(family.base)
    assert type(restored) is type(plain)
    assert torch.equal(restored(tokens).logits, plain(tokens).logits)
    assert {n for n, _ in restored.named_parameters()} == {n for n, _ in plain.named_parameters()}


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-sharded"])
def test_export_links_every_weight_file(families: dict[str, Family], name: str) -> None:
    theirs = {os.stat(file).st_ino for file in families[name].export.glob("*.safetensors")}
    ours = {os.stat(file).st_ino for file in families[name].base.glob("*.safetensors")}
    assert ours <= theirs
    assert len(theirs - ours) == (1 if name.startswith("qwen2") else 0)  # the zeros of o_proj


def test_export_keeps_the_tokens_of_a_text(families: dict[str, Family]) -> None:
    text = "the model of 12 layers, ä中"
    for family in families.values():
        expected = load_tokenizer(family.base)(text).input_ids
        assert load_tokenizer(family.export)(text).input_ids == expected
        assert AutoTokenizer.from_pretrained(family.export)(text).input_ids == expected


def test_script_compares_in_a_fresh_process_and_writes_a_gpu(families: dict[str, Family], tmp_path: Path) -> None:
    flags = ("--model_name_or_path", families["qwen3-bf16"].patched, "--output_dir", tmp_path / "out")
    result = run_script("patch_qwen_rope.py", "--export", "native", *flags)
    assert result.returncode == 0, result.stderr
    assert "bit-equal on CPU in bfloat16 and float32: 96 fixed random tokens at positions up to 511" in result.stdout
    gpu = (tmp_path / "out" / "README.md").read_text()
    assert "ExaoneMoeForCausalLM" in gpu
    assert "qwen3-bf16/patched" in gpu
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_an_export_that_differs_gets_no_name(
    families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_eps = lambda *args: to_native(*args) | {"rms_norm_eps": 1e-2}  # noqa: E731
    monkeypatch.setattr(export_module, "to_native", wrong_eps)
    with pytest.raises(FlareError, match="does not reproduce the model, and was discarded: logits differ by up to"):
        export_native(families["qwen2-tied"].patched, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2-tied", {"no_rope_layers": [1, 1, 1, 1, 1, 0]}, "contradicts itself: nope_layers says"),
        ("qwen2-tied", {"nope_layers": [5]}, "contradicts itself"),
        ("qwen2-tied", {"model_type": "qwen2"}, "do not fit|not what its configuration says"),
        ("qwen2-tied", {"rope_theta": 5.0}, "disagree"),
        ("qwen2-tied", {"num_hidden_layers": 7}, "contradicts|edited|do not fit"),
        ("qwen3-tied", {"layer_types": ["full_attention"] * 6}, "contradicts itself"),
        ("qwen3-tied", {"sliding_window": None}, "contradicts itself"),
        ("qwen3-tied", {"sliding_window": 8}, "sliding_window is 8"),
        ("qwen3-tied", {"mlp_layer_types": ["sparse"] * 6}, "mlp_layer_types is"),
        ("qwen3-tied", {"model_type": "qwen3"}, "sliding-window|not what its configuration says"),
    ],
)
def test_an_edited_export_is_caught(
    families: dict[str, Family], tmp_path: Path, name: str, changes: dict, words: str
) -> None:
    shutil.copytree(families[name].export, tmp_path / "lie")
    config = read_model_config(tmp_path / "lie")
    (tmp_path / "lie" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((CheckpointError, ConfigError), match=words) as caught:
        verify_directory(tmp_path / "lie")
    assert caught.value.exit_code == 2


def test_patching_an_export_names_the_way_back(families: dict[str, Family], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'smollm3' model.*--restore_rope makes a Qwen model"):
        patch_checkpoint(families["qwen2-tied"].export, tmp_path / "out", [1])


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3-untied"])
def test_an_export_that_transformers_saved_again_is_still_ours(
    families: dict[str, Family], tmp_path: Path, name: str
) -> None:
    """After fine-tuning, say: one file with o_proj biases in it, a config.json of transformers' making."""
    AutoModelForCausalLM.from_pretrained(families[name].export).save_pretrained(tmp_path / "saved")
    assert verify_directory(tmp_path / "saved") == verify_directory(families[name].export)
    restore_rope(tmp_path / "saved", tmp_path / "plain")
    restored, plain = load_causal_lm(tmp_path / "plain"), load_causal_lm(families[name].base)
    tokens = torch.arange(20)[None]
    assert torch.equal(restored(tokens).logits, plain(tokens).logits)


def test_trained_o_proj_biases_are_not_thrown_away(families: dict[str, Family], tmp_path: Path) -> None:
    """Somebody fine-tuned the export: its biases are not zeros any more."""
    model = load_causal_lm(families["qwen2-tied"].export)
    model.model.layers[4].self_attn.o_proj.bias.data[3] = 0.5
    model.save_pretrained(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match=r"layers\.4\.self_attn\.o_proj\.bias is not 0"):
        restore_rope(tmp_path / "tuned", tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""NoPE layers: the right layers, bit for bit, and RoPE never returns silently."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

import patch_qwen_rope as script
from flare.errors import CheckpointError, ConfigError
from flare.nope.load import load_causal_lm, load_tokenizer
from flare.nope.patch import patch_checkpoint, patch_qwen_rope
from flare.nope.probe import probe_nope_layers, verify_nope
from tests.conftest import write_base
from tests.processes import run_script

FAMILIES = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(1))


def reference_logits(directory: Path, family: str, layers: list[int], attention: str) -> torch.Tensor:
    """Plain transformers with cos=1, sin=0 fed to the chosen layers: written without any code of ours."""
    model = FAMILIES[family].from_pretrained(directory, attn_implementation=attention).eval()
    for index in layers:
        module = model.model.layers[index].self_attn

        def without_rotation(*args, original=module.forward, **kwargs):
            cos, sin = kwargs.pop("position_embeddings")
            return original(*args, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

        module.forward = without_rotation
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [[1, 3], [0], [0, 1, 2, 3]])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_bitwise_those_of_identity_rotation(
    tmp_path: Path, family: str, layers: list[int], attention: str
) -> None:
    directory = write_base(tmp_path / "base", family, tie_word_embeddings=layers == [0])
    model = FAMILIES[family].from_pretrained(directory, attn_implementation=attention).eval()
    patch_qwen_rope(model, layers)
    with torch.no_grad():
        logits = model(tokens()).logits
    assert torch.equal(logits, reference_logits(directory, family, layers, attention))
    plain = FAMILIES[family].from_pretrained(directory).eval()
    assert (plain(tokens()).logits - logits).abs().max() > 1e-3  # RoPE did matter


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_touches_this_instance_only(tmp_path: Path, family: str) -> None:
    directory = write_base(tmp_path / "base", family)
    patch_qwen_rope(FAMILIES[family].from_pretrained(directory), "1 3")
    assert probe_nope_layers(FAMILIES[family].from_pretrained(directory)) == []


def test_patching_sets_theta_of_the_other_layers(base: Path) -> None:
    model = patch_qwen_rope(Qwen2ForCausalLM.from_pretrained(base), [1], rope_theta=77.0)
    reference = Qwen2ForCausalLM.from_pretrained(base, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    assert torch.equal(model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


def test_patching_twice_and_other_families_are_refused(base: Path) -> None:
    model = patch_qwen_rope(Qwen2ForCausalLM.from_pretrained(base), [1])
    with pytest.raises(ConfigError, match="has NoPE layers already: 1"):
        patch_qwen_rope(model, [2])
    with pytest.raises(ConfigError, match="patches no layer"):
        patch_qwen_rope(Qwen2ForCausalLM.from_pretrained(base), "none")
    with pytest.raises(ConfigError, match="out of range"):
        patch_qwen_rope(Qwen2ForCausalLM.from_pretrained(base), [4])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_instance_saves_itself_with_its_code(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family].from_pretrained(write_base(tmp_path / "base", family))
    patch_qwen_rope(model, [1, 3]).save_pretrained(tmp_path / "saved")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert type(opened).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(opened(tokens()).logits, model.eval()(tokens()).logits)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["nope_layers"] == [1, 3]


# -- on disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def patched(base: Path, tmp_path: Path) -> Path:
    patch_checkpoint(base, tmp_path / "patched", ["1", "3"])
    return tmp_path / "patched"


def test_patched_directory_links_weights_and_keeps_the_tokenizer(base: Path, patched: Path) -> None:
    assert os.stat(patched / "model.safetensors").st_ino == os.stat(base / "model.safetensors").st_ino
    text = "the model of 12 layers, ä中"
    assert load_tokenizer(patched)(text).input_ids == load_tokenizer(base)(text).input_ids


def test_stock_transformers_refuses_without_trust_remote_code(patched: Path) -> None:
    with pytest.raises(Exception, match=r"trust_remote_code|custom code|not recognize"):
        AutoModelForCausalLM.from_pretrained(patched, trust_remote_code=False)


def test_remote_code_gives_the_same_model_in_a_process_without_this_repo(patched: Path, tmp_path: Path) -> None:
    ours = load_causal_lm(patched)
    with torch.no_grad():
        torch.save(ours(tokens()).logits, tmp_path / "logits.pt")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoModel\n"
        "assert not any('flare' in m for m in sys.modules)\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        "x = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))\n"
        "assert torch.equal(m(x).logits, torch.load(sys.argv[2]))\n"
        "AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    (tmp_path / "open.py").write_text(code)
    result = run_script(str(tmp_path / "open.py"), patched, tmp_path / "logits.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_config_has_both_spellings_of_theta(patched: Path) -> None:
    config = json.loads((patched / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert (config["model_type"], config["nope_layers"]) == ("qwen2_nope", [1, 3])


def edit_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


def test_disagreeing_thetas_are_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    edit_config(tmp_path / "copy", rope_theta=5.0)
    with pytest.raises(CheckpointError, match="disagree"):
        patch_checkpoint(tmp_path / "copy", tmp_path / "out", "1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "'llama' model; supported: qwen2"),
        ({"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_cannot_be_patched_is_named(base: Path, tmp_path: Path, changes: dict, words: str) -> None:
    shutil.copytree(base, tmp_path / "copy")
    edit_config(tmp_path / "copy", **changes)
    with pytest.raises(ConfigError, match=words):
        patch_checkpoint(tmp_path / "copy", tmp_path / "out", "1")


def test_patching_a_patched_checkpoint_is_refused(patched: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has NoPE layers already"):
        patch_checkpoint(patched, tmp_path / "out", "2")


def test_missing_tensors_are_refused_and_named(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    edit_config(tmp_path / "copy", num_hidden_layers=5, layer_types=["full_attention"] * 5)
    with pytest.raises(CheckpointError, match=r"missing tensors \(first: model.layers.4"):
        load_causal_lm(tmp_path / "copy")


def test_foreign_code_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "copy")
    edit_config(tmp_path / "copy", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(CheckpointError, match="wants to run its own code"):
        load_causal_lm(tmp_path / "copy")


# -- the probe ---------------------------------------------------------------------------------------------------


def test_probe_sees_through_a_class_swapped_back(patched: Path) -> None:
    model = load_causal_lm(patched)
    assert verify_nope(model) == [1, 3]
    model.model.layers[3].self_attn.__class__ = modeling_qwen2.Qwen2Attention  # RoPE back, silently
    with pytest.raises(CheckpointError, match="configured 1 3, found 1"):
        verify_nope(model)


def test_probe_leaves_the_model_as_it_was(patched: Path) -> None:
    model = load_causal_lm(patched).train()
    with torch.no_grad():
        before = model(tokens()).logits
        probe_nope_layers(model)
        assert torch.equal(model(tokens()).logits, before)
    assert model.training


# -- the script ---------------------------------------------------------------------------------------------------


def test_script_patches_and_inspects(base: Path, tmp_path: Path) -> None:
    flags = ("--model_name_or_path", base, "--no_rope_layers", "2-3", "--rope_theta", "5e5", "--output_dir")
    result = run_script("patch_qwen_rope.py", *flags, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    result = run_script("patch_qwen_rope.py", "--inspect", tmp_path / "out")
    assert "qwen2_nope" in result.stdout
    assert "2-3" in result.stdout
    assert "500000" in result.stdout
    result = run_script(
        "patch_qwen_rope.py", "--model_name_or_path", base, "--no_rope_layers", "9", "--output_dir", "x"
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "out of range" in result.stderr


def test_script_is_an_importable_module() -> None:
    assert script.patch_qwen_rope is patch_qwen_rope
    assert script.verify_nope is verify_nope

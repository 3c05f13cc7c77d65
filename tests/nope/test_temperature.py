"""--nope_temperature: a factor on the scores of NoPE layers, in the weights and nowhere else."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flare.errors import CheckpointError, ConfigError
from flare.hub import read_model_config
from flare.nope.export.export import restore_rope
from flare.nope.export.native import to_native
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint, patch_qwen_rope
from flare.nope.temperature import scaled
from tests.conftest import write_base

LAYERS = [1, 3]


def tokens(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain model in several shards."""
    directory = write_base(tmp_path_factory.mktemp("plain") / "base", request.param)
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="30KB")
    return directory


def scaled_reference(plain: Path, beta: float, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The patched model with ``scaling`` of its NoPE layers' attention multiplied: no weight is touched."""
    model = patch_qwen_rope(AutoModelForCausalLM.from_pretrained(plain, dtype=dtype).eval(), LAYERS)
    for index in LAYERS:
        model.model.layers[index].self_attn.scaling *= beta
    return model


@pytest.mark.parametrize("beta", [2.0, 0.25])
def test_power_of_two_is_bitwise_a_factor_on_scaling(plain: Path, tmp_path: Path, beta: float) -> None:
    patch_checkpoint(plain, tmp_path / "patched", LAYERS, nope_temperature=beta)
    reference = scaled_reference(plain, beta)
    with torch.no_grad():
        logits = load_causal_lm(tmp_path / "patched")(tokens()).logits
        assert torch.equal(logits, reference(tokens()).logits)
        assert (logits - scaled_reference(plain, 1.0)(tokens()).logits).abs().max() > 1e-3  # it has an effect


def test_any_factor_scales_the_scores_of_nope_layers_in_float64(plain: Path) -> None:
    """Attention outputs: relative 1e-12. Logits of the whole model: 1e-6, for transformers' norms round to fp32."""
    beta = 1.37
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64).eval()
    patch_qwen_rope(model, LAYERS, nope_temperature=beta)
    reference = scaled_reference(plain, beta, torch.float64)
    hidden = torch.randn(2, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, reference.model.layers, strict=True):
            positions = model.model.rotary_emb(hidden, torch.arange(40)[None])
            outputs = [layer.self_attn(hidden, positions, None)[0] for layer in (ours, theirs)]
            torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model(tokens()).logits, reference(tokens()).logits, rtol=1e-6, atol=1e-6)


def test_only_shards_with_queries_of_nope_layers_are_rewritten(plain: Path, tmp_path: Path) -> None:
    patch_checkpoint(plain, tmp_path / "patched", LAYERS, nope_temperature=3.0)
    family = read_model_config(plain)["model_type"]
    part = r"q_norm\.weight" if family == "qwen3" else r"q_proj\.(weight|bias)"
    query = re.compile(rf"model\.layers\.[13]\.self_attn\.{part}")
    linked = 0
    for file in plain.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "patched" / file.name)
        queries = {name for name in before if query.fullmatch(name)}
        assert {name for name in before if not torch.equal(before[name], after[name])} == queries
        assert all(torch.equal(after[name], (before[name].double() * 3.0).float()) for name in queries)
        same_file = os.stat(file).st_ino == os.stat(tmp_path / "patched" / file.name).st_ino
        assert same_file == (not queries)
        linked += same_file
    assert linked > 3


def test_loaded_and_stored_patch_are_the_same_model(plain: Path, tmp_path: Path) -> None:
    patch_checkpoint(plain, tmp_path / "patched", LAYERS, nope_temperature=1.7)
    model = patch_qwen_rope(AutoModelForCausalLM.from_pretrained(plain), LAYERS, nope_temperature=1.7)
    stored = dict(load_causal_lm(tmp_path / "patched").named_parameters())
    assert all(torch.equal(parameter, stored[name]) for name, parameter in model.named_parameters())
    assert model.config.nope_temperature == 1.7
    model.save_pretrained(tmp_path / "saved")
    assert read_model_config(tmp_path / "saved")["nope_temperature"] == 1.7


def test_temperature_is_recorded_and_goes_along_into_an_export(plain: Path, tmp_path: Path) -> None:
    patch_checkpoint(plain, tmp_path / "patched", LAYERS, nope_temperature=0.5)
    config = read_model_config(tmp_path / "patched")
    assert config["nope_temperature"] == 0.5
    assert to_native(config, "MODEL")["nope_temperature"] == 0.5


def test_restoring_rope_takes_the_temperature_out_again(plain: Path, tmp_path: Path) -> None:
    patch_checkpoint(plain, tmp_path / "patched", LAYERS, nope_temperature=4.0)
    restore_rope(tmp_path / "patched", tmp_path / "back")
    assert "nope_temperature" not in read_model_config(tmp_path / "back")
    theirs = dict(load_causal_lm(plain).named_parameters())
    for name, parameter in load_causal_lm(tmp_path / "back").named_parameters():
        assert torch.equal(parameter, theirs[name])


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, 1.0])
def test_factors_that_make_no_sense_are_refused(plain: Path, tmp_path: Path, beta: float) -> None:
    with pytest.raises(ConfigError, match="--nope_temperature"):
        patch_checkpoint(plain, tmp_path / "out", LAYERS, nope_temperature=beta)
    assert not (tmp_path / "out").exists()


def test_a_factor_that_overflows_the_stored_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"q_proj\.weight times 1024 is too large for torch\.float16"):
        scaled("q_proj.weight", torch.tensor([100.0], dtype=torch.float16), 1024.0)


def test_a_temperature_without_nope_layers_is_a_contradiction(base: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    for file in base.iterdir():
        os.link(file, tmp_path / "odd" / file.name)
    config = read_model_config(base) | {"nope_temperature": 2.0}
    (tmp_path / "odd" / "config.json").unlink()
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="nope_temperature but no NoPE layers"):
        patch_checkpoint(tmp_path / "odd", tmp_path / "out", LAYERS)

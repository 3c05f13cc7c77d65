"""modeling_nope.py outside this repository: what it refuses, what vLLM reads in it, and how an old one is replaced."""

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from flare.errors import ConfigError
from flare.nope import modeling_nope
from flare.nope.config_json import MODELING_FILE
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint
from flare.nope.refresh import refresh_modeling_file


def takes_a_new_argument(self, hidden_states, position_embeddings, attention_mask, kv_store=None, **kwargs):
    """A stock attention layer of some later transformers, whose cache has another name once more."""


@pytest.mark.parametrize(("family", "attention"), [("base", Qwen2Attention), ("base_qwen3", Qwen3Attention)])
def test_an_unknown_argument_of_the_stock_attention_is_refused_when_the_model_is_built(
    family: str, attention: type, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_checkpoint(request.getfixturevalue(family), tmp_path / "patched", ["1"])
    monkeypatch.setattr(attention, "forward", takes_a_new_argument)
    with pytest.raises(ImportError, match=f"{attention.__name__} takes kv_store, which modeling_nope.py .* not know"):
        load_causal_lm(tmp_path / "patched")


@pytest.mark.parametrize("attention", modeling_nope.NOPE_ATTENTION.values())
def test_vllm_finds_one_call_of_the_attention_interface_in_each_forward(attention: type) -> None:
    """As its transformers backend looks for it. Source: vllm 0.32, model_executor/models/transformers/fusers."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    looked_up = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS[")
        for target in node.targets
    }
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in looked_up]
    assert len(calls) == 1
    assert "self.scaling" in [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "scaling"]


def test_refresh_replaces_an_old_file_and_nothing_else(base: Path, tmp_path: Path) -> None:
    model = tmp_path / "patched"
    patch_checkpoint(base, model, ["1"])
    (model / MODELING_FILE.name).write_text("# an older file\n")
    before = {p.name: p.read_bytes() for p in model.iterdir() if p.name != MODELING_FILE.name}
    assert refresh_modeling_file(model)
    assert (model / MODELING_FILE.name).read_bytes() == MODELING_FILE.read_bytes()
    assert {p.name: p.read_bytes() for p in model.iterdir() if p.name != MODELING_FILE.name} == before
    assert not refresh_modeling_file(model)


def test_refresh_refuses_what_does_not_use_the_file(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not use modeling_nope"):
        refresh_modeling_file(base)
    patch_checkpoint(base, tmp_path / "checkpoint-1", ["1"])
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="this is a checkpoint"):
        refresh_modeling_file(tmp_path / "checkpoint-1")

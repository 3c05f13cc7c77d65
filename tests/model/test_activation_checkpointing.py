"""Selective checkpointing keeps products and attention, and losses and gradients stay bit-identical."""

import importlib
from pathlib import Path

import pytest
import torch

from flare.model import activation_checkpointing
from flare.model.activation_checkpointing import checkpoint_layers
from tests.plan.models import rows_of_tokens, tiny_training
from tests.processes import train
from tests.train.test_runs import losses


def loss_and_gradients(
    family: str, train_what: str, bf16: bool, attention: str, selective: bool
) -> dict[str, torch.Tensor]:
    model, _, _ = tiny_training(family, train_what, bf16, False, attention)
    if selective:
        layers = checkpoint_layers(model.causal_lm, selective=True)
        assert layers == (list(range(6)) if train_what == "all" else [2, 3, 4, 5])
    torch.manual_seed(1)
    ids, positions = rows_of_tokens(100, rows=2, seq_len=48, documents=2)
    loss = model(ids, ids, positions)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.trainable_parameters()}


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("train_what", ["all", "nope", "nope_attention"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_bit_identical(family: str, train_what: str, bf16: bool, attention: str) -> None:
    plain, selective = (loss_and_gradients(family, train_what, bf16, attention, how) for how in (False, True))
    assert plain.keys() == selective.keys()
    assert all(torch.equal(tensor, selective[name]) for name, tensor in plain.items())


def kept(monkeypatch: pytest.MonkeyPatch, attention: str) -> list[str]:
    """Names of the operations whose outputs one layer keeps, in order."""
    names, policy = [], activation_checkpointing._policy

    def note_kept(seen: dict, context: object, op: object, *args: object, **kwargs: object) -> object:
        answer = policy(seen, context, op, *args, **kwargs)
        names.extend([op.name()] if answer is activation_checkpointing.CheckpointPolicy.MUST_SAVE else [])
        return answer

    monkeypatch.setattr(activation_checkpointing, "_policy", note_kept)
    loss_and_gradients("qwen2", "all", False, attention, selective=True)
    return names[: len(names) // 6]


def test_six_products_and_the_attention_kernel_are_kept_and_down_proj_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    products = ["aten::addmm"] * 3 + ["aten::mm"] * 3
    kernel = ["aten::_scaled_dot_product_flash_attention_for_cpu"]
    assert kept(monkeypatch, "sdpa") == products[:3] + kernel + products[3:]


def test_eager_attention_keeps_no_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, "eager") == ["aten::addmm"] * 3 + ["aten::mm"] * 3


def test_gpu_kernels_are_recognised_by_name() -> None:
    """They do not run here, but their operations are registered."""
    importlib.import_module("torch.nn.attention.varlen")
    kernels = [torch.ops.torch_attn._varlen_attn.default] + [
        getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention").default
        for kind in ("flash", "efficient", "cudnn")
    ]
    assert all(map(activation_checkpointing._is_attention, kernels))
    others = (torch.ops.aten.bmm, torch.ops.aten._softmax, torch.ops.aten._to_copy, torch.ops.aten.silu)
    assert not any(activation_checkpointing._is_attention(op.default) for op in others)


def test_a_run_logs_it_and_has_the_losses_of_a_run_without(train_flags: list[str], tmp_path: Path) -> None:
    for name in ("false", "selective"):
        result = train(*train_flags, "--stage", 2, "--experiment_name", name, "--gradient_checkpointing", name)
        assert result.returncode == 0, result.stderr
    assert "gradient checkpointing selective" in result.stderr  # the plan
    assert "selective gradient checkpointing on layers 0-3" in result.stderr
    assert losses(tmp_path / "out" / "selective", 2) == losses(tmp_path / "out" / "false", 2)

"""Memory-efficient norms and MLPs give the results of transformers' own."""

from copy import deepcopy

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from flare.model.memory_efficient_layers import _RMSNorm, _swiglu_mlp, use_memory_efficient_layers

FAMILIES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
RELATIVE = 1e-5
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same random model twice: transformers' own, and with memory-efficient layers. No norm weight is one."""
    config_class, model_class = FAMILIES[request.param]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=300, hidden_size=128, intermediate_size=224, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    plain = model_class(config).train()
    for parameter in plain.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    efficient = deepcopy(plain)
    use_memory_efficient_layers(efficient)
    return plain, efficient


def run(model: torch.nn.Module, half: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, all gradients in one vector)."""
    ids = torch.randint(0, 300, (3, 64), generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", half, enabled=half is not None):
        output = model(ids, labels=ids)
    output.loss.backward()
    return output.logits, torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def error(gradient: torch.Tensor, truth: torch.Tensor) -> float:
    return ((gradient - truth).norm() / truth.norm()).item()


def test_logits_are_bit_identical_and_gradients_equal(pair) -> None:
    (logits, gradient), (efficient_logits, efficient_gradient) = map(run, pair)
    assert torch.equal(logits, efficient_logits)
    assert error(efficient_gradient, gradient) < RELATIVE


@pytest.mark.parametrize("half", HALVES)
def test_under_autocast_gradients_are_as_close_to_fp32(pair, half: torch.dtype) -> None:
    _, truth = run(pair[0])
    (logits, gradient), (efficient_logits, efficient_gradient) = (run(model, half) for model in pair)
    assert torch.equal(logits, efficient_logits)
    assert error(efficient_gradient, truth) < 1.1 * error(gradient, truth)


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_weights_without_autocast_give_the_same_bits(pair, dtype: torch.dtype) -> None:
    """As FSDP2 gathers weights, and as frozen layers store them."""
    logits, efficient_logits = (model.to(dtype)(torch.arange(40)[None]).logits for model in pair)
    assert logits.dtype == dtype and torch.equal(logits, efficient_logits)


@pytest.mark.parametrize("frozen", ["input", "weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_input_or_weight_gets_no_gradient_and_the_other_the_same(frozen: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(48)
    norm.weight.data.normal_()
    norm.weight.requires_grad_(frozen != "weight")
    x = torch.randn(2, 5, 48).to(dtype).requires_grad_(frozen != "input")
    wanted = norm.weight if frozen == "input" else x
    toward = torch.randn(2, 5, 48)
    efficient = _RMSNorm.apply(x, norm.weight, norm.variance_epsilon, torch.float32)
    theirs = norm(x)
    assert torch.equal(efficient, theirs)
    ours, expected = (torch.autograd.grad(y, wanted, toward)[0] for y in (efficient, theirs))
    assert ours.dtype == expected.dtype
    tolerance = {"rtol": RELATIVE, "atol": RELATIVE} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_has_the_same_bits_in_its_gradients_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = Qwen2MLP(Qwen2Config(hidden_size=32, intermediate_size=80)).to(dtype)
    x = torch.randn(2, 7, 32, dtype=dtype, requires_grad=True)
    toward = torch.randn(2, 7, 32, dtype=dtype)
    leaves = (x, *mlp.parameters())
    ours, theirs = (torch.autograd.grad(y, leaves, toward) for y in (_swiglu_mlp(mlp, x), mlp(x)))
    assert all(map(torch.equal, ours, theirs))


def test_another_activation_function_is_not_replaced() -> None:
    config = Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, hidden_act="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Qwen2ForCausalLM(config)
    efficient = deepcopy(plain)
    use_memory_efficient_layers(efficient)
    ids = torch.arange(20)[None]
    assert torch.equal(plain(ids).logits, efficient(ids).logits)

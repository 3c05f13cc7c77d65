"""The loss without full logits, and its gradients, against float64."""

import pytest
import torch

from flare.data.training_rows import IGNORE_INDEX
from flare.model.linear_cross_entropy import gradient_of_chunk, linear_cross_entropy_sum, score_tokens


@pytest.mark.parametrize("frozen_head", [False, True])
def test_fused_loss_and_gradients_are_those_of_float64(frozen_head: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 48), torch.randn(900, 48) / 7
    labels = torch.randint(0, 900, (700,))
    labels[::5] = IGNORE_INDEX
    exact_hidden = hidden.double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    logits = exact_hidden @ exact_weight.T
    exact = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    exact.backward()
    hidden.requires_grad_()
    weight.requires_grad_(not frozen_head)
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=128)
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-5, atol=1e-6)
    if frozen_head:
        assert weight.grad is None
    else:
        torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-5)
    losses, hits = score_tokens(hidden, weight, labels, chunk_rows=128)
    assert losses.double().sum().item() == pytest.approx(exact.item(), rel=1e-6)
    assert torch.equal(hits, logits.argmax(-1) == labels)


def test_bf16_loss_sums_the_heads_gradient_in_fp32() -> None:
    """Against float64 on the same bf16 operands: 1.9e-3 of the norm, each chunk's product being rounded to bf16; a
    bf16 sum over 16 chunks was off by 9e-3."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(4096, 64).bfloat16(), torch.randn(600, 64) / 8, torch.randint(0, 600, (4096,))
    exact_weight = weight.bfloat16().double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ exact_weight.T, labels, reduction="sum").backward()
    weight.requires_grad_()
    linear_cross_entropy_sum(hidden, weight, labels, chunk_rows=256).backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad.double() - exact_weight.grad).norm() < 3e-3 * exact_weight.grad.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_the_gpu_gradient_of_a_chunk_equals_float64(dtype: torch.dtype, tolerance: float) -> None:
    """Its arithmetic, on the CPU. bf16: each number within half a bf16 step of float64 on the same logits, also where
    the target's probability is near 1."""
    torch.manual_seed(0)
    logits, labels = (4 * torch.randn(200, 300)).to(dtype), torch.randint(0, 300, (200,))
    logits[torch.arange(0, 200, 2), labels[::2]] = 12.0
    labels[::5] = IGNORE_INDEX
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    expected.backward()
    nll, gradient = gradient_of_chunk(logits, torch.eye(300, dtype=dtype), labels)
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient.double(), exact.grad, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_scale_of_a_bf16_gradient_is_not_rounded(device: str) -> None:
    """1/3009 in bf16 is 0.14 % off, and so would be every gradient below the head. The sum shows 1e-5."""
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64, device=device).bfloat16().requires_grad_()
    weight, labels = torch.randn(50, 64, device=device).bfloat16(), torch.randint(50, (3000,), device=device)
    gradients = []
    for scale in (1.0, 1 / 3009):
        hidden.grad = None
        (linear_cross_entropy_sum(hidden, weight, labels) * torch.tensor(scale, device=device)).backward()
        gradients.append(hidden.grad.double())
    whole, scaled = gradients
    ratio = (whole * scaled).sum() / (whole * whole).sum()
    assert ratio.item() == pytest.approx(1 / 3009, rel=5e-5)


def test_a_second_backward_through_the_loss_is_refused() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(6, 4)
    loss = linear_cross_entropy_sum(hidden, weight, torch.randint(0, 6, (8,)))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()

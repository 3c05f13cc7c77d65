"""The loss in fp16: its gradients lose no digits over a vocabulary of 151,936."""

import pytest
import torch

from flare.data.training_rows import IGNORE_INDEX
from flare.model.linear_cross_entropy import FP16_FOLD, InPlaceGradient, gradient_of_chunk, linear_cross_entropy_sum

VOCAB_SIZE = 151_936


def test_gradients_over_qwens_vocabulary_are_closer_to_float64_than_bf16s() -> None:
    """On the same operands, relative to the norm, a vocabulary of 151,936: fp16 3.4e-4, bf16 2.6e-3."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 32), torch.randn(VOCAB_SIZE, 32) / 2, torch.randint(0, VOCAB_SIZE, (64,))
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        ours = [hidden.to(dtype).requires_grad_(), weight.to(dtype).float().requires_grad_()]
        exact = [tensor.detach().double().requires_grad_() for tensor in ours]
        expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
        expected.backward()
        loss = linear_cross_entropy_sum(*ours, labels)
        (loss * 1024).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        errors[dtype] = [
            ((o.grad.double() / 1024 - e.grad).norm() / e.grad.norm()).item() for o, e in zip(ours, exact, strict=True)
        ]
    assert max(errors[torch.float16]) < 5e-4 < min(errors[torch.bfloat16])


@pytest.mark.parametrize("on_gpu", [False, True])
def test_no_probability_of_qwens_vocabulary_loses_digits_in_fp16(on_gpu: bool) -> None:
    """The gradient by the logits, the GPUs' way and the CPU's: each number within half a step (4.9e-4) of float64 on
    the same logits, 1 / 151,936 and a thousandth of it; unfolded, fp16 holds those to 3e-8: the second as 0."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, VOCAB_SIZE).half(), torch.randint(0, VOCAB_SIZE, (8,))
    logits[:, ::2] -= 7
    logits[3, labels[3]] = 16.0  # a probability near 1
    labels[5] = IGNORE_INDEX
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="sum")
    expected.backward()
    if on_gpu:
        nll, gradient = gradient_of_chunk(logits, _Unchanged(logits), labels)
    else:
        place = InPlaceGradient.__new__(InPlaceGradient)
        place.wide = torch.empty(8, VOCAB_SIZE)
        wanted = (labels != IGNORE_INDEX)[:, None]
        gradient = logits.clone()
        nll = place._block(gradient, wanted, torch.where(wanted, labels[:, None], 0))
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == torch.float16
    assert exact.grad.abs()[exact.grad != 0].min() < 1e-8
    beyond = exact.grad.abs() > 2e-9  # below, fp16 has no full digits even when folded
    found = gradient.double() / FP16_FOLD
    assert torch.allclose(found[beyond], exact.grad[beyond], rtol=4.9e-4, atol=0)
    assert torch.allclose(found, exact.grad, rtol=4.9e-4, atol=2e-12)


class _Unchanged:
    """A head whose product with the rows is the rows."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.T = self
        self.rows = rows

    def __rmatmul__(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.clone()


def test_a_token_that_every_row_predicts_wrongly_overflows_no_product() -> None:
    """The gradient of its head row is a sum over 512 rows of hidden states of size 200: 102,400, beyond fp16."""
    hidden, weight = torch.full((512, 8), 200.0).half().requires_grad_(), torch.zeros(300, 8, requires_grad=True)
    linear_cross_entropy_sum(hidden, weight, torch.full((512,), 7)).backward()
    assert weight.grad[7].tolist() == pytest.approx([-102_400 * 299 / 300] * 8, rel=1e-3)

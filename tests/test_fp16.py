"""``--precision fp16``: what it rounds, how its loss is scaled, and that it is what torch and HF's Trainer do."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flare.data.order import RowOrder
from flare.data.tokens import TokenCache
from flare.errors import ConfigError, EnvError, FlareError
from flare.loss import _chunk_gradient, linear_cross_entropy_sum
from flare.loss_scale import GROWTH_INTERVAL, INITIAL_SCALE, LossScale
from flare.model import checkpoint_layers
from flare.options import Options
from flare.outcomes import Outcomes
from flare.progress import Progress
from flare.trainable import Trainable
from flare.trainer import Trainer
from tests.conftest import torchrun, train
from tests.test_outcomes import poison, weights
from tests.test_training import cache, gradients, load, rows_of, trainer  # noqa: F401 (a fixture)

VOCAB_SIZE = 151_936


# -- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_card", [False, True])
def test_no_probability_of_qwens_vocabulary_vanishes_from_the_logits_gradient(on_card: bool) -> None:
    """Random hidden states and weights, so that probabilities lie around 1 / 151,936: fp16's gradients are those of
    float64 within 5e-4 of their norm, where bf16's are 4e-3 off. Their probabilities below 6e-8 count, too."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(64, 32), torch.randn(VOCAB_SIZE, 32) / 2, torch.randint(0, VOCAB_SIZE, (64,))
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        operands = [hidden.to(dtype), weight.to(dtype)]
        exact = [tensor.double().requires_grad_() for tensor in operands]
        expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, labels, reduction="sum")
        expected.backward()
        ours = [operands[0].requires_grad_(), operands[1].float().requires_grad_()]
        loss = linear_cross_entropy_sum(*ours, labels)
        (loss * 4).backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4 if dtype == torch.float16 else 1e-3)
        errors[dtype] = [
            ((o.grad.double() / 4 - e.grad).norm() / e.grad.norm()).item() for o, e in zip(ours, exact, strict=True)
        ]
    print(errors)

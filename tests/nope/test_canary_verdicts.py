"""Verdicts of the canary by hand, and models that it cannot distinguish."""

import json
from pathlib import Path

import pytest
import torch

from flare.nope.canary.file import CANARY_FILE, LOCAL, SERVER, classify
from flare.nope.canary.measure import check_canary, write_canary
from flare.nope.load import load_causal_lm
from tests.nope.canary_models import LAYERS, make_patched


def test_indistinguishable_models_are_called_so(tmp_path: Path) -> None:
    """Attention that is off: with and without RoPE the model answers the same."""
    directory = make_patched(tmp_path)
    model = load_causal_lm(directory)
    with torch.no_grad():
        for index in LAYERS:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
    write_canary(model, directory)
    content = json.loads((directory / CANARY_FILE).read_text())
    assert content["separation_nats"] == 0
    assert content["told_apart"] == {"in_fp32": False, "on_a_bf16_server": False}
    assert check_canary(model, directory).what == "undecidable"


@pytest.mark.parametrize(
    ("offset", "separation", "limits", "what"),
    [
        (0.0, 1.0, SERVER, "true model"),
        (0.24, 1.0, SERVER, "true model"),
        (0.26, 1.0, SERVER, "neither"),  # beyond what a server's precision explains
        (0.76, 1.0, SERVER, "RoPE everywhere"),
        (0.5, 1.0, SERVER, "neither"),
        (0.09, 0.3, SERVER, "true model"),
        (0.15, 0.3, SERVER, "neither"),
        (0.06, 0.15, SERVER, "undecidable"),  # both references within a bf16 server's noise
        (0.0, 0.15, SERVER, "true model"),  # but an exact server can be distinguished
        (0.0, 0.0005, LOCAL, "undecidable"),
        (0.005, 0.0005, LOCAL, "neither"),
        (float("nan"), 1.0, SERVER, "neither"),
    ],
)
def test_classify_by_hand(offset: float, separation: float, limits: object, what: str) -> None:
    true = [-1.0, -2.0, -3.0]
    verdict = classify([x + offset for x in true], true, [x + separation for x in true], limits)
    assert verdict.what == what
    assert verdict.separation == pytest.approx(separation)

"""A model whose config.json was edited does not pass its canary in training, evaluation and --verify."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flare.errors import CheckpointError
from flare.evaluation.models import loaded
from flare.evaluation.options import EvaluationSettings
from flare.evaluation.scoring.batches import ALONE
from flare.evaluation.session import Evaluation
from flare.model.training_model import load_for_training
from flare.nope.canary.measure import write_canary
from flare.nope.export.verify import verify_directory
from flare.nope.load import load_causal_lm
from flare.plan.trainable import Trainable
from tests.nope.canary_models import LAYERS, make_patched
from tests.processes import train


def edit_config(directory: Path, **changes: object) -> None:
    """Set keys of config.json; None removes a key."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


LIES = {
    "other layers": ({"nope_layers": [1, 2]}, "names NoPE layers 1-2, its nope_canary.json 1 3"),
    "RoPE everywhere": (
        {"model_type": "qwen2", "nope_layers": None, "auto_map": None},
        "names NoPE layers none, its nope_canary.json",
    ),
    "another theta": (
        {"rope_theta": 20.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20.0}},
        "is not the model of its nope_canary.json: neither",
    ),
}


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_patched(tmp_path_factory.mktemp("honest"))
    write_canary(load_causal_lm(directory), directory)
    return directory


@pytest.mark.parametrize("lie", LIES)
def test_training_does_not_start_from_a_model_that_lies(
    honest: Path, train_flags: list[str], tmp_path: Path, lie: str
) -> None:
    shutil.copytree(honest, tmp_path / "model")
    changes, words = LIES[lie]
    edit_config(tmp_path / "model", **changes)
    flags = [*train_flags[: train_flags.index("--no_rope_layers")], "--model_name_or_path", tmp_path / "model"]
    result = train(*flags, "--stage", 2)
    assert result.returncode == 2, result.stderr
    (line,) = result.errors
    assert words in line
    assert "put the true config.json back, or remove nope_canary.json" in line
    assert not list((tmp_path / "out" / "run").glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("lie", LIES)
def test_evaluation_and_verify_refuse_a_model_that_lies(honest: Path, corpus: Path, tmp_path: Path, lie: str) -> None:
    shutil.copytree(honest, tmp_path / "model")
    changes, words = LIES[lie]
    edit_config(tmp_path / "model", **changes)
    settings = EvaluationSettings(str(tmp_path / "model"), (str(corpus),), tmp_path / "evaluation")
    with pytest.raises(CheckpointError, match=words):
        Evaluation(settings, ALONE, torch.device("cpu")).run()
    with pytest.raises(CheckpointError, match=r"is not the model of its nope_canary\.json"):
        verify_directory(tmp_path / "model")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_true_model_passes_in_every_precision(
    honest: Path, corpus: Path, tmp_path: Path, stored: str, precision: str
) -> None:
    """Rounding to the precision of training or evaluation is not an edit."""
    shutil.copytree(honest, tmp_path / "model")
    load_causal_lm(honest).to(getattr(torch, stored)).save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", auto_map=json.loads((honest / "config.json").read_text())["auto_map"])
    write_canary(load_causal_lm(tmp_path / "model"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == stored
    if precision != "fp16":
        load_for_training(tmp_path / "model", config, Trainable.of(LAYERS), precision, "auto")
    settings = EvaluationSettings(str(tmp_path / "model"), (str(corpus),), tmp_path / "out", precision=precision)
    with loaded(tmp_path / "model", settings, torch.device("cpu")) as (model, *_):
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{PRECISIONS[precision]}"}

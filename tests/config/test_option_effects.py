"""Options that no other test covers: each is set, and its effect is checked."""

import json
from pathlib import Path

import pytest
import torch

from flare.config.options import Options
from flare.optim.optimizer import build_optimizer
from tests.conftest import write_base, write_corpus
from tests.processes import run_script, train


def test_adam_uses_betas_and_epsilon_of_the_flags() -> None:
    """Three updates against the formula of Loshchilov and Hutter's Algorithm 2, in float64; tolerance 1e-6."""
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    settings = {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-2, "learning_rate": 0.1, "weight_decay": 0.2}
    optimizer = build_optimizer([("weight", parameter)], Options(**settings))
    expected, mean, square = parameter.detach().double(), torch.zeros(4, 3).double(), torch.zeros(4, 3).double()
    for step in (1, 2, 3):
        parameter.grad = torch.randn(4, 3)
        gradient = parameter.grad.double()
        mean, square = 0.5 * mean + 0.5 * gradient, 0.7 * square + 0.3 * gradient**2
        update = (mean / (1 - 0.5**step)) / ((square / (1 - 0.7**step)).sqrt() + 1e-2)
        expected = expected - 0.1 * (update + 0.2 * expected)
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-6, atol=1e-6)


def test_decrease_below_the_threshold_is_not_an_improvement(train_flags: list[str], tmp_path: Path) -> None:
    """No loss decreases by 100 nats, so the patience of two evaluations ends the run."""
    result = train(
        *train_flags, "--max_steps", 50, "--eval_steps", 2, "--early_stopping_patience", 2,
        "--early_stopping_threshold", 100,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    history = json.loads((tmp_path / "out" / "run" / "training_metrics.json").read_text())["stages"]["1"]["history"]
    evaluated = [(record["step"], record["is_best"]) for record in history if "eval_loss" in record]
    assert evaluated == [(0, True), (2, False), (4, False)]


def test_number_of_tokenizing_workers_does_not_change_the_cache(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for seed in range(4):
        write_corpus(folder / f"{seed}.jsonl", 30, seed)
    tokens = []
    for workers in (1, 3):
        cache = tmp_path / f"cache{workers}"
        result = train(
            "--prepare_only", "--preprocessing_num_workers", workers, "--model_name_or_path", base,
            "--dataset_name", folder, "--cache_dir", cache, "--base_output_dir", tmp_path, "--max_seq_length", 32,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        (file,) = cache.glob("tokens-*/tokens.bin")
        tokens.append(file.read_bytes())
    assert tokens[0] == tokens[1]


@pytest.mark.slow
def test_passkey_samples_is_the_number_of_texts_at_each_depth(tmp_path: Path) -> None:
    model = write_base(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=2048)
    documents = write_corpus(tmp_path / "documents.jsonl", 5)
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", model, "--datasets", documents, "--output_dir", tmp_path / "out",
        "--max_length", 2048, "--passkey", "--passkey_samples", 2, "--generate_tokens", 0, "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    cells = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["passkey"]
    assert {cell["num_samples"] for cell in cells} == {2}

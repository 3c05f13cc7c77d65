"""Fixtures: tiny models, a small corpus, flags of a run that takes seconds."""

import json
import os
import random
import shutil
import tempfile
from pathlib import Path

# One thread per process: OpenMP's threads of two processes on the same cores wait for each other a hundred
# times longer than they work. Set before anything imports torch.
os.environ["OMP_NUM_THREADS"] = "1"
# The hub's caches are the tests' own: HOME may be read-only, and what a user has cached must not decide a test.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="flare-tests-hf-")

import pytest
from hypothesis import HealthCheck, settings

from flare.logs import quiet_torchao

quiet_torchao()  # before the conftest of faults/ imports torch

WORDS = "the of layer head token model rope attention value query key and a to in is loss step row data".split()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the rows marked slow, too")
    parser.addoption("--faults", action="store_true", help="run all rows of the fault matrix")


def pytest_configure(config: pytest.Config) -> None:
    """Property tests use the same examples in every run, so a failure can be reproduced on every machine."""
    fixed = {"derandomize": True, "deadline": None, "database": None}
    settings.register_profile("some", max_examples=25, **fixed)
    settings.register_profile("many", max_examples=2000, suppress_health_check=[HealthCheck.too_slow], **fixed)
    settings.load_profile("many" if config.getoption("--faults") else "some")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    slow = pytest.mark.skip(reason="slow: ./run_tests.sh --slow")
    faults = pytest.mark.skip(reason="the rest of the fault matrix: ./run_tests.sh --faults")
    no_gpu = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
        if item.get_closest_marker("faults") and not config.getoption("--faults"):
            item.add_marker(faults)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


def write_corpus(path: Path, documents: int = 120, seed: int = 0, column: str = "text") -> Path:
    """A .jsonl of random sentences, the same for the same seed."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            text = " ".join(rng.choices(WORDS, k=rng.randint(5, 120)))
            file.write(json.dumps({"id": number, column: f"{number} {text}"}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


def write_base(directory: Path, family: str = "qwen2", seed: int = 0, **changes: object) -> Path:
    """A tiny random base model with a tokenizer; biases and norms are random, too."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Qwen2Tokenizer().train_new_from_iterator([" ".join(WORDS)] * 4, 300, show_progress=False)
    end = tokenizer.eos_token_id
    shape = {
        "vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "bos_token_id": end, "eos_token_id": end, "dtype": "float32",
    }  # fmt: skip
    if family == "qwen3":
        shape["head_dim"] = 16
    config_class, model_class = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(shape | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)  # sharper attention: a wrong mask or position shows in the logits
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "qwen2")


@pytest.fixture(scope="session")
def base_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "qwen3", "qwen3")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train_flags(base: Path, corpus: Path, cache_dir: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that takes seconds; append more to override."""
    return [
        "--gpu_type", "cpu", "--model_name_or_path", str(base), "--dataset_name", str(corpus),
        "--cache_dir", str(cache_dir), "--base_output_dir", str(tmp_path / "out"), "--experiment_name", "run",
        "--max_seq_length", "32", "--per_device_train_batch_size", "2", "--max_steps", "6", "--eval_steps", "3",
        "--logging_steps", "1", "--validation_split_percentage", "10", "--learning_rate", "1e-3",
        "--gradient_checkpointing", "false", "--no_rope_layers", "1", "3",
    ]  # fmt: skip

"""Fixtures of the evaluation tests: a tiny model, its tokenizers, and a base model on disk."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.conftest import write_base, write_corpus
from tests.evaluation.models import bpe_tokenizer, bytes_tokenizer, tiny


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="module", name="bytes_tokenizer")
def bytes_tokenizer_fixture() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("processes") / "base")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("processes") / "docs.jsonl", 25)

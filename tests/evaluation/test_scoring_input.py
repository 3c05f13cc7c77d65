"""What is counted, and which input is refused: empty texts, wrong tokenizers, windows that are too long."""

import json
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flare.errors import ConfigError, DataError, FlareError
from flare.evaluation.scoring.token_sequences import tokenize_documents
from tests.evaluation.models import PROSE, score, tiny

SCHEMA_FIELDS = [
    "status", "num_documents", "num_tokens", "num_bytes", "num_words", "truncated_documents", "loss",
    "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "token_accuracy", "loss_by_position",
]  # fmt: skip


def test_empty_documents_are_not_counted(model, tokenizer):
    with_empty = score(model, tokenizer, ["", PROSE, ""])
    assert with_empty.to_json() == score(model, tokenizer, [PROSE]).to_json()
    assert with_empty.document_nll.shape == (1,)


def test_overflowing_word_perplexity_is_none(model, tokenizer):
    result = score(model, tokenizer, ["这是一个没有空格的句子" * 30])
    assert result.num_words == 1
    assert result.word_perplexity is None
    json.dumps(result.to_json(), allow_nan=False)


def test_json_has_exactly_the_fields_of_the_schema(model, tokenizer):
    assert list(score(model, tokenizer, [PROSE]).to_json()) == SCHEMA_FIELDS


def test_progress_reaches_the_number_of_tokens(model, tokenizer):
    calls = []
    result = score(model, tokenizer, [PROSE] * 9, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) > 2
    assert calls[-1] == (result.num_tokens, result.num_tokens)
    assert 0 < result.timed_tokens < result.num_tokens  # the first batch is warm-up


@pytest.mark.parametrize(
    ("texts", "min_tokens", "message"),
    [
        ([], 1, "0 documents"),
        ([""], 1, "0 tokens"),
        (["a b"], 100, "at least 100"),
        (["fine", "\ud800"], 1, "document 1"),
        ([None], 1, "document 0 is NoneType"),
    ],
)
def test_too_few_tokens_is_a_data_error(model, tokenizer, texts, min_tokens, message):
    with pytest.raises(DataError, match=message):
        score(model, tokenizer, texts, min_tokens=min_tokens)


def test_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="does not belong"):
        score(tiny(vocab_size=100), tokenizer, [PROSE])


def test_tokenizer_without_bos_and_eos_needs_a_prefix(model, bytes_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="prefix_token_id"):
        score(model, bare, [PROSE])
    assert score(model, bare, [PROSE], prefix_token_id=0).loss == score(model, bytes_tokenizer, [PROSE]).loss


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_unknown_prefix_token_id_is_refused(model, tokenizer, beyond):
    with pytest.raises(ConfigError, match=f"--prefix_token_id {beyond}: the tokenizer has 0 to {len(tokenizer) - 1}"):
        score(model, tokenizer, [PROSE], prefix_token_id=beyond)


def test_windows_longer_than_learned_positions_are_refused(tokenizer):
    gpt2 = tiny("gpt2", n_positions=24, max_position_embeddings=24)
    with pytest.raises(ConfigError, match="learned positions for 24"):
        score(gpt2, tokenizer, [PROSE], max_length=25)
    assert score(gpt2, tokenizer, [PROSE], max_length=24).num_tokens
    assert score(tiny(max_position_embeddings=24), tokenizer, [PROSE], max_length=25).num_tokens


def test_non_finite_loss_names_the_document(bytes_tokenizer):
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[bytes_tokenizer.convert_tokens_to_ids("Z")] = math.nan
    texts = ["a fine document " * 4, "another", "a Zebra"]
    with pytest.raises(FlareError, match="document 2 is nan"):
        score(model, bytes_tokenizer, texts)


def test_tokenizing_in_chunks_keeps_every_text(tokenizer):
    texts = [f"document {i}" for i in range(600)]
    expected = [[7, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    assert tokenize_documents(tokenizer, texts, 7) == expected

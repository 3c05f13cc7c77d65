"""Perplexity and related metrics agree with transformers' own loss, lm-eval, and tables worked by hand."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from flare.evaluation.scoring.perplexity import position_edges
from flare.evaluation.scoring.scorer import TokenScorer
from flare.evaluation.scoring.windows import document_windows
from flare.model.linear_cross_entropy import score_tokens
from tests.evaluation.models import PROSE, lookup_model, score, tiny, with_bos

MAX_LENGTH = 16


RELATIVE = 1e-6


def exactly(tokenizer, count: int) -> str:
    """A text of ``count`` tokens."""
    ids = tokenizer(PROSE * 3)["input_ids"]
    for start in range(len(ids) - count):
        text = tokenizer.decode(ids[start : start + count])
        if len(tokenizer(text)["input_ids"]) == count:
            return text
    raise AssertionError(f"no text of {count} tokens")


def documents(tokenizer) -> list[str]:
    """All lengths that matter: one token, a window and one less and more, several; many bytes a character."""
    lengths = (1, 2, MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1, 2 * MAX_LENGTH, 5 * MAX_LENGTH + 3)
    return [*(exactly(tokenizer, n) for n in lengths), "Здравствуй, 世界! 🌍 naïve  café\n", " ", PROSE]


def test_windows_of_a_document_worked_by_hand():
    sequence = [9, 1, 2, 3, 4, 5]  # prefix 9 and five tokens
    windows = document_windows(0, 5, max_length=3)
    assert [w.inputs(sequence) for w in windows] == [[9, 1, 2], [2, 3, 4]]
    assert [w.labels(sequence, -100) for w in windows] == [[1, 2, 3], [-100, 4, 5]]
    assert document_windows(0, 0, max_length=3) == []


def test_windows_equal_lm_evals_rolling_windows():
    utils = pytest.importorskip("lm_eval.utils")
    for num_tokens, max_length in itertools.product(range(40), (1, 2, 3, 7, 8, 64)):
        tokens = list(range(1, num_tokens + 1))
        sequence = [0, *tokens]
        theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, 0, max_length, 1))
        ours = document_windows(0, num_tokens, max_length)
        for window, (context, targets) in itertools.zip_longest(ours, theirs):
            assert sequence[window.first_target : window.stop] == targets
            assert window.inputs(sequence) == (context + targets)[:-1]


def test_position_edges_are_half_octaves_up_to_max_length():
    assert position_edges(16) == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert position_edges(1) == [0, 1]
    assert position_edges(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]


def test_perplexity_of_a_zeroed_lm_head_is_the_vocabulary_size(tokenizer):
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    result = score(model, tokenizer, documents(tokenizer))
    assert result.perplexity == pytest.approx(330, rel=RELATIVE)
    assert all(bucket["loss"] == pytest.approx(math.log(330), rel=RELATIVE) for bucket in result.loss_by_position)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "gpt2", "gpt_neox", "opt"])
def test_one_window_equals_the_models_own_loss(model_type, tokenizer):
    model = tiny(model_type)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROSE)["input_ids"]]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    result = score(model, tokenizer, [PROSE], max_length=128)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=RELATIVE)
    assert result.loss > math.log(330) + 0.1  # a flat model would pass whatever the code does


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("phi", {}),
    ],
)
def test_full_logits_are_computed_when_they_are_not_a_linear_function_of_the_lm_head(model_type, overrides, tokenizer):
    model = tiny(model_type, **overrides)
    if model_type == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROSE)["input_ids"]]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert not TokenScorer(model, "cpu", ids[0].tolist()).fused
    assert score(model, tokenizer, [PROSE], max_length=128).loss == pytest.approx(expected, rel=RELATIVE)


def test_qwen_is_scored_without_full_logits(model, tokenizer):
    assert TokenScorer(model, "cpu", tokenizer(PROSE)["input_ids"]).fused


def test_batch_size_changes_nothing(model, tokenizer):
    alone, together = (score(model, tokenizer, documents(tokenizer), batch_size=n) for n in (1, 8))
    np.testing.assert_allclose(together.document_nll, alone.document_nll, rtol=RELATIVE)
    np.testing.assert_array_equal(together.document_tokens, alone.document_tokens)
    assert together.token_accuracy == alone.token_accuracy
    for a, b in zip(alone.loss_by_position, together.loss_by_position, strict=True):
        assert b == a | {"loss": pytest.approx(a["loss"], rel=RELATIVE)}


def test_dropout_is_off_and_training_mode_is_restored(tokenizer, model):
    training = tiny(attention_dropout=0.5).train()
    assert score(training, tokenizer, [PROSE]).loss == score(model, tokenizer, [PROSE]).loss
    assert training.training


def lm_eval_rolling(model, tokenizer, texts: list[str], **kwargs) -> list[float]:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    lm = huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=1, backend="causal", **kwargs
    )
    requests = [instance.Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def test_document_nll_equals_lm_evals_rolling_loglikelihood(model, tokenizer):
    texts = documents(tokenizer)
    theirs = lm_eval_rolling(model, tokenizer, texts)
    np.testing.assert_allclose(score(model, tokenizer, texts).document_nll, -np.array(theirs), rtol=RELATIVE)


def test_bytes_words_and_bits_equal_lm_evals_wikitext_metrics(model, tokenizer):
    metrics = pytest.importorskip("lm_eval.api.metrics")
    texts = documents(tokenizer)
    theirs = lm_eval_rolling(model, tokenizer, texts)
    words = [(ll, len(re.split(r"\s+", text))) for ll, text in zip(theirs, texts, strict=True)]
    sizes = [(ll, len(text.encode("utf-8"))) for ll, text in zip(theirs, texts, strict=True)]
    result = score(model, tokenizer, texts)
    # exp() of some 30 nats a word multiplies the relative error of the sum: the exponents are compared.
    assert math.log(result.word_perplexity) == pytest.approx(
        math.log(metrics.weighted_perplexity(words)), rel=RELATIVE
    )
    assert result.byte_perplexity == pytest.approx(metrics.weighted_perplexity(sizes), rel=RELATIVE)
    assert result.bits_per_byte == pytest.approx(metrics.bits_per_byte(sizes), rel=RELATIVE)


def test_bos_added_by_the_tokenizer_is_not_scored(model, bytes_tokenizer):
    llama_like = with_bos(bytes_tokenizer)
    result = score(model, llama_like, [PROSE])
    theirs = lm_eval_rolling(model, llama_like, [PROSE], add_bos_token=False)
    assert result.num_tokens == len(PROSE)
    np.testing.assert_allclose(result.document_nll, -np.array(theirs), rtol=RELATIVE)


def test_accuracy_loss_and_position_buckets_of_a_lookup_model(bytes_tokenizer):
    size = len(bytes_tokenizer)
    model = lookup_model(bytes_tokenizer, {"a": "b", "b": "c", "c": "a", "<|endoftext|>": "a"}, logit=2.0)
    hit = math.log(math.exp(2.0) + size - 1) - 2.0
    miss = hit + 2.0
    result = score(model, bytes_tokenizer, ["abcabx", "b"], max_length=4)
    # abca|bx: five hits, x missed; b: missed. The second window is "ca" "bx": positions 2 and 3.
    assert (result.num_tokens, result.num_documents) == (7, 2)
    assert result.token_accuracy == pytest.approx(100 * 5 / 7)
    np.testing.assert_allclose(result.document_nll, [5 * hit + miss, miss], rtol=RELATIVE)
    expected = [(0, 1, (hit + miss) / 2, 2), (1, 2, hit, 1), (2, 3, hit, 2), (3, 4, (hit + miss) / 2, 2)]
    for bucket, (low, high, loss, count) in zip(result.loss_by_position, expected, strict=True):
        wanted = {"from": low, "to": high, "loss": pytest.approx(loss, rel=RELATIVE), "num_tokens": count}
        assert bucket == wanted


def test_weighted_mean_of_the_buckets_is_the_loss(model, tokenizer):
    result = score(model, tokenizer, documents(tokenizer))
    buckets = result.loss_by_position
    counts = [bucket["num_tokens"] for bucket in buckets]
    losses = [bucket["loss"] for bucket in buckets]
    assert sum(counts) == result.num_tokens == sum(result.document_tokens)
    assert np.average(losses, weights=counts) == pytest.approx(result.loss, rel=1e-12)
    assert len(set(losses)) == len(losses)


def test_token_scores_with_tied_logits_equal_torch():
    """Whole numbers give ties: of several highest logits, argmax takes the first."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 16).round(), torch.randn(50, 16).round()
    labels = torch.randint(0, 50, (200,))
    labels[::7] = -100
    logits = hidden @ weight.T
    losses, hits = score_tokens(hidden, weight, labels, chunk_rows=64)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses, expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(hits, logits.argmax(1) == labels)
    at_target = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    assert hits.sum() < ((logits.amax(1) == at_target) & (labels >= 0)).sum()

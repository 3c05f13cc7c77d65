"""Scores against what others compute: transformers' own loss, lm-eval, tables worked by hand."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from flare.errors import ConfigError, DataError, FlareError
from flare.evaluation import results as results_module
from flare.evaluation.scoring.perplexity import position_edges, score_documents
from flare.evaluation.scoring.scorer import TokenScorer
from flare.evaluation.scoring.token_sequences import tokenize_documents
from flare.evaluation.scoring.windows import document_windows
from flare.model.linear_cross_entropy import score_tokens
from tests.evaluation.models import PROSE, bpe_tokenizer, bytes_tokenizer, lookup_model, tiny, with_bos

MAX_LENGTH = 16
RELATIVE = 1e-6
SCHEMA_FIELDS = [
    "status", "num_documents", "num_tokens", "num_bytes", "num_words", "truncated_documents", "loss",
    "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "token_accuracy", "loss_by_position",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="module", name="bytes_tokenizer")
def bytes_tokenizer_fixture() -> PreTrainedTokenizerFast:
    return bytes_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny()


def score(model, tokenizer, texts, **overrides):
    settings = {"max_length": MAX_LENGTH, "batch_size": 4, "device": "cpu"}
    return score_documents(model, tokenizer, texts, **(settings | overrides))


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


# -- windows ------------------------------------------------------------------------------------------


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


def test_position_edges_are_half_octaves_and_end_at_the_length():
    assert position_edges(16) == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert position_edges(1) == [0, 1]
    assert position_edges(20) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 20]


# -- against transformers -----------------------------------------------------------------------------


def test_zeroed_lm_head_gives_the_vocabulary_size(tokenizer):
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
def test_logits_that_are_more_than_the_lm_head_are_computed_whole(model_type, overrides, tokenizer):
    model = tiny(model_type, **overrides)
    if model_type == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROSE)["input_ids"]]])
    with torch.no_grad():
        expected = model(ids, labels=ids).loss.item()
    assert not TokenScorer(model, "cpu", ids[0].tolist()).fused
    assert score(model, tokenizer, [PROSE], max_length=128).loss == pytest.approx(expected, rel=RELATIVE)


def test_qwen_is_scored_without_whole_logits(model, tokenizer):
    assert TokenScorer(model, "cpu", tokenizer(PROSE)["input_ids"]).fused


def test_batch_size_changes_nothing(model, tokenizer):
    alone, together = (score(model, tokenizer, documents(tokenizer), batch_size=n) for n in (1, 8))
    np.testing.assert_allclose(together.document_nll, alone.document_nll, rtol=RELATIVE)
    np.testing.assert_array_equal(together.document_tokens, alone.document_tokens)
    assert together.token_accuracy == alone.token_accuracy
    for a, b in zip(alone.loss_by_position, together.loss_by_position, strict=True):
        assert b == a | {"loss": pytest.approx(a["loss"], rel=RELATIVE)}


def test_dropout_is_off_and_the_mode_comes_back(tokenizer, model):
    training = tiny(attention_dropout=0.5).train()
    assert score(training, tokenizer, [PROSE]).loss == score(model, tokenizer, [PROSE]).loss
    assert training.training


# -- against lm-eval ----------------------------------------------------------------------------------


def lm_eval_rolling(model, tokenizer, texts: list[str], **kwargs) -> list[float]:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    lm = huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=1, backend="causal", **kwargs
    )
    requests = [instance.Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


def test_every_document_equals_lm_evals_rolling_loglikelihood(model, tokenizer):
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


def test_a_bos_that_the_tokenizer_adds_is_context_and_not_text(model, bytes_tokenizer):
    llama_like = with_bos(bytes_tokenizer)
    result = score(model, llama_like, [PROSE])
    theirs = lm_eval_rolling(model, llama_like, [PROSE], add_bos_token=False)
    assert result.num_tokens == len(PROSE)
    np.testing.assert_allclose(result.document_nll, -np.array(theirs), rtol=RELATIVE)


# -- against a table ----------------------------------------------------------------------------------


def test_accuracy_loss_and_positions_of_a_table(bytes_tokenizer):
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


def test_scores_of_a_head_with_many_equal_logits_are_torchs_own():
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


# -- counts and what is refused -----------------------------------------------------------------------


def test_empty_documents_are_not_counted(model, tokenizer):
    with_empty = score(model, tokenizer, ["", PROSE, ""])
    assert with_empty.to_json() == score(model, tokenizer, [PROSE]).to_json()
    assert with_empty.document_nll.shape == (1,)


def test_an_overflowing_word_perplexity_is_none_and_not_infinity(model, tokenizer):
    result = score(model, tokenizer, ["这是一个没有空格的句子" * 30])
    assert result.num_words == 1
    assert result.word_perplexity is None
    json.dumps(result.to_json(), allow_nan=False)


def test_json_has_exactly_the_schemas_fields(model, tokenizer):
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
def test_nothing_to_score_is_a_data_error(model, tokenizer, texts, min_tokens, message):
    with pytest.raises(DataError, match=message):
        score(model, tokenizer, texts, min_tokens=min_tokens)


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="does not belong"):
        score(tiny(vocab_size=100), tokenizer, [PROSE])


def test_a_tokenizer_without_bos_and_eos_needs_a_prefix(model, bytes_tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer)
    with pytest.raises(ConfigError, match="prefix_token_id"):
        score(model, bare, [PROSE])
    assert score(model, bare, [PROSE], prefix_token_id=0).loss == score(model, bytes_tokenizer, [PROSE]).loss


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_a_prefix_that_the_tokenizer_has_not_is_refused_by_the_options_name(model, tokenizer, beyond):
    with pytest.raises(ConfigError, match=f"--prefix_token_id {beyond}: the tokenizer has 0 to {len(tokenizer) - 1}"):
        score(model, tokenizer, [PROSE], prefix_token_id=beyond)


def test_windows_longer_than_learned_positions_are_refused(tokenizer):
    gpt2 = tiny("gpt2", n_positions=24, max_position_embeddings=24)
    with pytest.raises(ConfigError, match="learned positions for 24"):
        score(gpt2, tokenizer, [PROSE], max_length=25)
    assert score(gpt2, tokenizer, [PROSE], max_length=24).num_tokens
    assert score(tiny(max_position_embeddings=24), tokenizer, [PROSE], max_length=25).num_tokens


def test_a_loss_that_is_not_finite_names_the_document(bytes_tokenizer):
    model = tiny()
    with torch.no_grad():
        model.model.embed_tokens.weight[bytes_tokenizer.convert_tokens_to_ids("Z")] = math.nan
    texts = ["a fine document " * 4, "another", "a Zebra"]
    with pytest.raises(FlareError, match="document 2 is nan"):
        score(model, bytes_tokenizer, texts)


def test_texts_are_tokenized_in_chunks_without_losing_one(tokenizer):
    texts = [f"document {i}" for i in range(600)]
    expected = [[7, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    assert tokenize_documents(tokenizer, texts, 7) == expected


# -- the results file ---------------------------------------------------------------------------------


def test_results_merge_data_sets_and_come_back_from_disk(model, tokenizer, tmp_path):
    record = results_module.model_record(model, tokenizer, "some/model", probed_layers=[])
    results = results_module.new_results(record, {"protocol": "document"}, {"torch": torch.__version__})
    scored = score(model, tokenizer, [PROSE] * 5)
    path = tmp_path / "evaluation" / "evaluation_results.json"
    results_module.add_dataset(results, "first", scored)
    results_module.write_results(results, path)
    assert list(json.loads(path.read_text())["datasets"]) == ["first"]
    results_module.add_failure(results, "second", DataError("no such file"))
    results_module.add_throughput(results, [scored], "cpu")
    results_module.write_results(results, path)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["schema_version"] == 1
    assert read["datasets"]["first"]["perplexity"] == scored.perplexity
    assert read["datasets"]["second"] == {"status": "failed", "error": "no such file"}
    assert read["throughput"]["tokens_per_sec"] == pytest.approx(scored.timed_tokens / scored.timed_sec)
    assert read["throughput"]["peak_memory_bytes"] > 2**20
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_number_that_is_not_finite_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "evaluation_results.json"
    path.write_text("before")
    results = results_module.new_results({}, {}, {})
    results["datasets"]["x"] = {"loss_by_position": [{"loss": 1.0}, {"loss": math.nan}]}
    with pytest.raises(FlareError, match=r"datasets\.x\.loss_by_position\.1\.loss"):
        results_module.write_results(results, path)
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_model_record_compares_the_probe_with_the_configuration(tokenizer):
    model = tiny()
    plain = results_module.model_record(model, tokenizer, "p", probed_layers=[])
    assert plain["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert plain["nope_layers"] == [] and plain["nope_probe"] == {"verified": True, "layers": []}
    assert plain["rope_theta"] == model.config.rope_parameters["rope_theta"]
    model.config.nope_layers = [1]
    verified = {
        str(probed): results_module.model_record(model, tokenizer, "p", probed)["nope_probe"]["verified"]
        for probed in ([1], [], None)
    }
    assert verified == {"[1]": True, "[]": False, "None": None}


def test_no_rope_layers_of_smollm3_are_read_the_right_way_round():
    config = transformers.SmolLM3Config(num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0])
    assert results_module.declared_nope_layers(config) == [3, 7]


def test_tokenizer_hash_survives_saving_and_padding_and_sees_another_vocabulary(tokenizer, bytes_tokenizer, tmp_path):
    before = results_module.tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded.pad_token = loaded.eos_token
    loaded(["a", "longer text"], padding=True)
    assert results_module.tokenizer_sha256(loaded) == before
    assert results_module.tokenizer_sha256(bytes_tokenizer) != before

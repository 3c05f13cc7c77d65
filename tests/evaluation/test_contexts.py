"""Strides, joined documents and context lengths: against HF's guide, transformers' loss, and tables."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from flare.config.validate import parse_lengths
from flare.data.mixture import MixedRows
from flare.data.packing import PackedRows
from flare.errors import ConfigError, DataError
from flare.evaluation.during_training import long_documents
from flare.evaluation.scoring.batches import Engine, length_sorted_batches
from flare.evaluation.scoring.context import beyond_positions, num_targets, score_context_lengths
from flare.evaluation.scoring.continuation import Continuation, score_continuations
from flare.evaluation.scoring.perplexity import score_documents
from flare.evaluation.scoring.scorer import TokenScorer
from flare.evaluation.scoring.token_sequences import make_corpus
from flare.evaluation.scoring.windows import Window, document_windows, tail_window
from tests.evaluation.models import PROSE, bytes_tokenizer, lookup_model, tiny
from tests.processes import train

RELATIVE = 1e-6
LONG = PROSE * 4


def score(model, tokenizer, texts, **settings):
    return score_documents(
        model, tokenizer, texts, **({"max_length": 16, "batch_size": 2, "device": "cpu"} | settings)
    )


def engine(model, batch_tokens: int = 256) -> Engine:
    return Engine(TokenScorer(model, "cpu", [1, 2, 3]), batch_tokens)


# -- strides ------------------------------------------------------------------------------------------


def test_strided_windows_worked_by_hand():
    windows = document_windows(0, 8, max_length=4, stride=2)
    assert windows == [Window(0, 0, 1, 5), Window(0, 2, 5, 7), Window(0, 4, 7, 9)]
    assert [w.input_length for w in windows] == [4, 4, 4]


def test_every_token_is_scored_once_for_any_stride():
    for tokens, length, stride in itertools.product(range(30), (1, 3, 8), (1, 2, 3, 8)):
        windows = document_windows(0, tokens, length, min(stride, length))
        targets = [t for w in windows for t in range(w.first_target, w.stop)]
        assert targets == list(range(1, tokens + 1))
        assert all(1 <= w.input_length <= length for w in windows)


def test_strided_perplexity_equals_hf_guide_with_its_token_count(model, tokenizer):
    """The loop of transformers' guide "Perplexity of fixed-length models", unchanged; and exact counts."""
    max_length, stride, windows = 17, 5, 9  # their windows hold the targets, too: one more than ours see
    ids = tokenizer(LONG)["input_ids"][: max_length + stride * (windows - 1)]
    input_ids = torch.tensor([ids])
    nll_sum, n_tokens, exact_sum, exact_tokens, prev_end = 0.0, 0, 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        target_ids = input_ids[:, begin:end].clone()
        target_ids[:, : -(end - prev_end)] = -100
        with torch.no_grad():
            loss = model(input_ids[:, begin:end], labels=target_ids).loss
        num_valid_tokens = (target_ids != -100).sum().item()
        num_loss_tokens = num_valid_tokens - 1
        nll_sum += loss.item() * num_loss_tokens
        n_tokens += num_loss_tokens
        predicted = (target_ids[:, 1:] != -100).sum().item()
        exact_sum += loss.item() * predicted
        exact_tokens += predicted
        prev_end = end
        if end == len(ids):
            break
    ours = document_windows(0, len(ids) - 1, max_length - 1, stride)
    parts = [(losses.sum(), len(losses)) for s in engine(model).score(ours, [ids]) for _, losses, _ in s.per_window()]
    means = {w: total / n for w, (total, n) in enumerate(parts)}
    their_counts = [n if w == 0 else n - 1 for w, (_, n) in enumerate(parts)]
    copied = sum(means[w] * n for w, n in enumerate(their_counts)) / sum(their_counts)
    assert copied == pytest.approx(nll_sum / n_tokens, rel=RELATIVE)
    assert sum(their_counts) == n_tokens
    exact = sum(total for total, _ in parts) / sum(n for _, n in parts)
    assert exact == pytest.approx(exact_sum / exact_tokens, rel=RELATIVE)
    assert exact != pytest.approx(nll_sum / n_tokens, rel=1e-4)


def test_stride_adds_context_and_scores_the_same_tokens(model, tokenizer):
    disjoint, strided = score(model, tokenizer, [LONG]), score(model, tokenizer, [LONG], stride=4)
    assert strided.num_tokens == disjoint.num_tokens == sum(b["num_tokens"] for b in strided.loss_by_position)
    early = sum(b["num_tokens"] for b in strided.loss_by_position if b["to"] <= 12)
    assert early == 12  # only the first window has targets with little before them
    assert strided.loss != disjoint.loss


# -- joined documents ---------------------------------------------------------------------------------


def test_concat_scores_the_same_tokens_and_no_separator(tokenizer):
    texts = ["one", "", PROSE, "two words"]
    alone, joined = (make_corpus(tokenizer, texts, 7, protocol) for protocol in ("document", "concat"))
    (sequence,), (owners,) = joined.sequences, joined.owners
    assert sequence[0] == 7 and sequence.count(tokenizer.eos_token_id) == 2
    assert joined.total_tokens == alone.total_tokens == (owners >= 0).sum()
    for document, own in enumerate(alone.sequences):
        assert [t for t, o in zip(sequence, owners, strict=True) if o == document] == own[1:]


def test_concat_in_one_window_equals_the_models_own_loss(model, tokenizer):
    texts = [PROSE, "The end. " * 3]
    ids, labels = [tokenizer.eos_token_id], [-100]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        ids += [*tokens, tokenizer.eos_token_id]
        labels += [*tokens, -100]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    result = score(model, tokenizer, texts, protocol="concat", max_length=200)
    assert result.loss == pytest.approx(expected, rel=RELATIVE)
    assert result.num_bytes == sum(len(text.encode()) for text in texts)
    assert result.document_tokens.tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]


def test_concat_of_one_document_equals_document_protocol(model, tokenizer):
    assert score(model, tokenizer, [LONG], protocol="concat").to_json() == score(model, tokenizer, [LONG]).to_json()


# -- context lengths ----------------------------------------------------------------------------------


def test_tail_windows_worked_by_hand():
    sequence = [9, 1, 2, 3, 4, 5]
    window = tail_window(0, 5, context_length=3, num_targets=2)
    assert window.inputs(sequence) == [2, 3, 4] and window.labels(sequence, -100) == [-100, 4, 5]
    assert tail_window(0, 5, context_length=5, num_targets=2).inputs(sequence) == [9, 1, 2, 3, 4]
    assert [num_targets(lengths) for lengths in ([512, 1024], [8, 64], [2], [4096])] == [256, 4, 1, 256]


def test_every_context_length_scores_the_same_tokens(model, tokenizer):
    texts = [LONG, "too short", PROSE * 3]
    rows = score_context_lengths(engine(model), tokenizer, texts, [32, 8, 64])
    assert [row["context_length"] for row in rows] == [8, 32, 64]
    assert {(row["num_tokens"], row["num_documents"]) for row in rows} == {(8, 2)}
    for row in rows:
        nll = 0.0
        for text in (texts[0], texts[2]):
            ids = torch.tensor([tokenizer(text)["input_ids"][-row["context_length"] - 1 :]])
            with torch.no_grad():
                logits = model(ids[:, :-1]).logits[0, -4:]
            nll += torch.nn.functional.cross_entropy(logits, ids[0, -4:], reduction="sum").item()
        assert row["loss"] == pytest.approx(nll / 8, rel=RELATIVE)
    assert len({row["loss"] for row in rows}) == 3


def test_prefix_token_precedes_a_document_of_the_longest_length(model, tokenizer):
    length = len(tokenizer(PROSE)["input_ids"])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    expected = score_context_lengths(engine(model), tokenizer, [PROSE], [8, length])
    assert score_context_lengths(engine(model), bare, [PROSE], [8, length], prefix_token_id=0) == expected
    other = score_context_lengths(engine(model), bare, [PROSE], [8, length], prefix_token_id=9)
    assert other[0] == expected[0] and other[1]["loss"] != expected[1]["loss"]


def test_model_that_ignores_context_has_equal_loss_at_every_length():
    tokenizer = bytes_tokenizer()
    table = lookup_model(tokenizer, {"o": "r", "r": "e", "Ġ": "t"}, logit=3.0)
    rows = score_context_lengths(engine(table), tokenizer, [LONG, LONG[5:]], [16, 64, 256])
    assert rows[0]["loss"] != pytest.approx(math.log(len(tokenizer)), rel=1e-3)
    for row in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=RELATIVE)


def test_error_for_short_documents_gives_their_length(model, tokenizer):
    with pytest.raises(DataError, match="no document holds 4,096 tokens"):
        score_context_lengths(engine(model), tokenizer, [PROSE], [64, 4096])


def test_lengths_beyond_rope_positions_warn_and_beyond_learned_positions_fail(model, tokenizer):
    assert beyond_positions(model, [64, 128]) == ""
    assert beyond_positions(model, [64, 256, 512]).startswith(
        "256, 512 tokens are more than max_position_embeddings 128"
    )
    assert score_context_lengths(engine(model), tokenizer, [PROSE * 9], [64, 256])[-1]["num_tokens"] == 32
    gpt2 = tiny("gpt2", n_positions=64, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="learned positions for 64"):
        score_context_lengths(engine(gpt2), tokenizer, [PROSE * 9], [64, 256])


def test_context_lengths_are_parsed_with_commas_or_spaces():
    assert parse_lengths(["1024,512", "512"], "--context_lengths") == [512, 1024]
    assert parse_lengths([64, 32], "--context_lengths") == [32, 64]
    for bad in (["512,many"], [""], ["1"], ["-4"]):
        with pytest.raises(ConfigError, match="as in 512,1024"):
            parse_lengths(bad, "--context_lengths")


def test_full_logits_start_at_the_first_scored_token(tokenizer):
    """Whole logits of a long context would fill a GPU for the few tokens behind it."""
    gemma = tiny("gemma2", final_logit_softcapping=2.0)
    ids = tokenizer(LONG)["input_ids"][:61]
    lengths = []
    gemma.lm_head.register_forward_hook(lambda _head, _inputs, output: lengths.append(output.shape[1]))
    scoring = engine(gemma)
    lengths.clear()
    answers = score_continuations(scoring, [Continuation(ids[:57], ids[57:]), Continuation(ids[:56], ids[56:])])
    assert lengths == [5]
    with torch.no_grad():
        expected = gemma(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    for answer, first in zip(answers, (57, 56), strict=True):
        nll = -sum(float(expected[i - 1, ids[i]]) for i in range(first, 61))
        assert answer.nll == pytest.approx(nll, rel=RELATIVE)


# -- batches ------------------------------------------------------------------------------------------


def test_batches_are_limited_in_tokens_and_sorted_by_length():
    windows = [Window(i, 0, 1, n + 1) for i, n in enumerate((3, 10, 4, 20, 1, 4))]
    batches = list(length_sorted_batches(windows, 12))
    assert [[w.input_length for w in batch] for batch in batches] == [[20], [10], [4, 4, 3], [1]]
    np.testing.assert_array_equal(sorted(w.document for batch in batches for w in batch), range(6))


# -- during training ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_records_context_length_curve_and_base_loss(train_flags, tmp_path):
    """The same numbers as the evaluation of the checkpoint's documents, and the base's loss from the base itself."""
    flags = [*train_flags, "--eval_context_lengths", "16,64", "--max_steps", "2", "--nproc_per_node", "2"]
    result = train(*flags)
    assert result.returncode == 0, result.stderr
    root = tmp_path / "out" / "run"
    history = json.loads((root / "training_metrics.json").read_text())["stages"]["1"]["history"]
    evaluations = [record for record in history if "eval_loss" in record]
    assert [record["step"] for record in evaluations] == [0, 2]
    for record in evaluations:
        assert [row["context_length"] for row in record["eval_context_lengths"]] == [16, 64]
    assert "at 64: " in (root / "training.log").read_text()
    assert [("rope_eval_loss" in record) for record in evaluations] == [True, False]
    control = train(*flags[:-6], "--no_rope_layers", "none", "--train_layers", "1", "--experiment_name", "control")
    assert control.returncode == 0, control.stderr
    metrics = json.loads((tmp_path / "out" / "control" / "training_metrics.json").read_text())
    base = next(r for r in metrics["stages"]["1"]["history"] if "eval_loss" in r)
    assert evaluations[0]["rope_eval_loss"] == pytest.approx(base["eval_loss"], rel=RELATIVE)
    assert evaluations[0]["eval_loss"] != pytest.approx(base["eval_loss"], rel=1e-5)
    assert "rope_eval_loss" not in base


def test_context_length_longer_than_every_held_out_document_is_refused(train_flags):
    result = train(*train_flags, "--eval_context_lengths", "8,100000")
    assert result.returncode == 2
    assert "--eval_context_lengths 100000: the longest held-out document has" in result.stderr


def packed(*documents: list[int]) -> PackedRows:
    """Rows of documents that end with token 0."""
    ended = [[*document, 0] for document in documents]
    offsets = np.cumsum([0, *map(len, ended)])
    cache = SimpleNamespace(tokens=np.concatenate(ended).astype(np.uint16), offsets=offsets, end_of_text_id=0)
    return PackedRows(cache, np.arange(len(documents)), 8, "document", keep_last=True)


def test_long_documents_are_taken_from_every_data_set():
    one, two = packed([1, 2], [3, 4, 5], [6, 7, 8, 9]), packed([10, 11, 12])
    assert long_documents(one, 3) == [[0, 3, 4, 5], [0, 6, 7, 8, 9]]
    assert long_documents(MixedRows(["a", "b"], [one, two]), 3) == [[0, 3, 4, 5], [0, 6, 7, 8, 9], [0, 10, 11, 12]]
    with pytest.raises(ConfigError, match="the longest held-out document has 4 tokens"):
        long_documents(MixedRows(["a", "b"], [two, one]), 5)

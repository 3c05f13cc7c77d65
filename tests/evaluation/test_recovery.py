"""The recovered share of the loss, and confidence intervals: worked by hand, and compared with scipy."""

import numpy as np
import pytest

from flare.evaluation.compare import difference
from flare.evaluation.report import bootstrap
from flare.evaluation.report.bootstrap import paired_difference
from flare.evaluation.report.recovery import control_curve, recovery, recovery_of
from flare.evaluation.report.sections import recovery_section
from flare.evaluation.report.verdict import context_verdict, passkey_verdict
from flare.evaluation.scoring.perplexity import DatasetScore


def curve(*points: tuple[int, int, float]) -> list[dict]:
    return [{"stage": stage, "tokens": tokens, "loss": loss} for stage, tokens, loss in points]


def test_recovery_worked_by_hand():
    found = recovery(2.0, curve((1, 0, 3.0), (1, 100, 2.5), (1, 200, 2.1), (2, 300, 2.05), (2, 400, 2.02)))
    assert found.jump == 1.0 and found.remaining == pytest.approx(0.02)
    assert found.won_back_percent == pytest.approx(98.0)
    assert found.tokens_to_95_percent == 300  # at 2.05, where exactly 5 % of the jump is left
    assert found.total_tokens == 400


def test_recovery_not_reached_and_recovery_beyond_the_base():
    never = recovery(2.0, curve((1, 0, 3.0), (1, 100, 2.5)))
    assert (never.won_back_percent, never.tokens_to_95_percent) == (pytest.approx(50.0), None)
    beyond = recovery(2.0, curve((1, 0, 3.0), (1, 100, 1.9)))
    assert (beyond.won_back_percent, beyond.remaining) == (pytest.approx(110.0), pytest.approx(-0.1))
    nothing = recovery(2.0, curve((1, 0, 2.001), (1, 100, 1.9)))
    assert nothing.won_back_percent is None and nothing.tokens_to_95_percent is None


def stages() -> dict:
    """training_metrics.json of two stages: the second counts its tokens from its own start."""
    return {
        "2": {"history": [{"tokens": 0, "eval_loss": 2.3}, {"tokens": 50, "eval_loss": 2.04}]},
        "1": {
            "history": [
                {"tokens": 0, "eval_loss": 3.0, "rope_eval_loss": 2.0},
                {"tokens": 80, "loss": 2.6},
                {"tokens": 100, "eval_loss": 2.3},
                {"tokens": 120, "loss": 2.4},
            ]
        },
    }


def test_recovery_counts_tokens_over_all_stages():
    found = recovery_of(stages())
    assert [(p["stage"], p["tokens"], p["loss"]) for p in found.curve] == [
        (1, 0, 3.0), (1, 100, 2.3), (2, 120, 2.3), (2, 170, 2.04),
    ]  # fmt: skip
    assert (found.base_loss, found.untrained_loss, found.tokens_to_95_percent) == (2.0, 3.0, 170)
    section = recovery_section({"recovery": found.to_json()})
    assert "| recovered | 96.0 % |" in section and "| tokens until 95 % was recovered | at most 170 |" in section


def test_control_curve_must_start_at_the_base_loss():
    history = [{"tokens": 0, "eval_loss": 3.0, "rope_eval_loss": 2.0}, {"tokens": 10, "eval_loss": 2.1}]
    found = recovery_of({"1": {"history": history}})
    control = {"1": {"history": [{"tokens": 0, "eval_loss": 2.00001}, {"tokens": 10, "eval_loss": 1.9}]}}
    assert [(p["tokens"], p["loss"]) for p in control_curve(found, control)] == [(0, 2.00001), (10, 1.9)]
    control["1"]["history"][0]["eval_loss"] = 2.01  # other documents, or another base
    assert control_curve(found, control) == control_curve(None, control) == control_curve(found, {}) == []


def test_no_recovery_without_base_loss_or_first_evaluation():
    without_base = stages()
    del without_base["1"]["history"][0]["rope_eval_loss"]
    late = stages()
    late["1"]["history"][0]["tokens"] = 10
    assert recovery_of(without_base) is recovery_of(late) is recovery_of({}) is None


# -- bootstrap ----------------------------------------------------------------------------------------


def documents(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 2000, count)
    hardness = draw.gamma(4.0, 0.6, count)
    return tokens, tokens * hardness, tokens * (hardness + draw.normal(0.02, 0.05, count))


def test_interval_equals_scipys_paired_percentile_bootstrap():
    scipy_stats = pytest.importorskip("scipy.stats")
    tokens, base, other = documents(0)
    ours = paired_difference(other, tokens, base, tokens)
    theirs = scipy_stats.bootstrap(
        (other, base, tokens), lambda a, b, n, axis=-1: a.sum(axis) / n.sum(axis) - b.sum(axis) / n.sum(axis),
        paired=True, method="percentile", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx((other.sum() - base.sum()) / tokens.sum(), rel=1e-12)
    low, high = ours.interval
    assert abs(low - theirs.low) < 0.06 * width and abs(high - theirs.high) < 0.06 * width
    assert ours == paired_difference(other, tokens, base, tokens)


def test_intervals_contain_the_true_difference_95_percent_of_the_time():
    held = 0
    for seed in range(200):
        tokens, base, other = documents(seed)
        found = paired_difference(other, tokens, base, tokens, seed)
        held += found.interval[0] <= 0.02 <= found.interval[1]
    assert 0.88 <= held / 200 <= 0.99


def test_one_document_has_no_interval_and_block_size_does_not_matter(monkeypatch):
    tokens, base, other = documents(1)
    one = paired_difference(other[:1], tokens[:1], base[:1], tokens[:1])
    assert one.value == pytest.approx((other[0] - base[0]) / tokens[0]) and one.interval is None
    whole = paired_difference(other, tokens, base, tokens)
    monkeypatch.setattr(bootstrap, "BLOCK_WEIGHTS", 7 * len(tokens))
    assert paired_difference(other, tokens, base, tokens).interval == pytest.approx(whole.interval, rel=1e-9)


def score_of(nll: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray) -> DatasetScore:
    fields = dict.fromkeys(DatasetScore.__dataclass_fields__)
    return DatasetScore(**fields | {"document_nll": nll, "document_tokens": tokens, "document_bytes": num_bytes})


def test_models_with_different_tokenizers_are_compared_per_byte():
    tokens, base, _ = documents(3)
    twice = score_of(base, 2 * tokens, 4 * tokens)  # another tokenizer needs twice the tokens, and knows as much
    once = score_of(base, tokens, 4 * tokens)
    assert difference(twice, once, True, 0).value < -0.5
    per_byte = difference(twice, once, False, 0)
    assert per_byte.value == 0.0 and per_byte.interval[0] <= 0.0 <= per_byte.interval[1]


def test_score_is_restored_from_json():
    import json

    tokens, base, _ = documents(4)
    score = score_of(base, tokens, 4 * tokens)
    back = DatasetScore.from_dict(json.loads(json.dumps(score.to_dict())))
    np.testing.assert_array_equal(back.document_nll, base)
    assert back.document_tokens.dtype == np.int64


# -- verdict ------------------------------------------------------------------------------------------


def model(label: str, role: str, perplexities: dict[int, float], tokenizer: str = "t") -> dict:
    size = {"num_tokens": 512, "num_documents": 2}
    rows = [{"context_length": n, "loss": float(np.log(p)), "perplexity": p} | size for n, p in perplexities.items()]
    found = [
        {"context_length": n, "depth_percent": d, "accuracy": a}
        for n, a in ((4096, 100.0), (16384, 0.0 if role == "base" else 60.0)) for d in (0, 100)
    ]  # fmt: skip
    curves = {"pg19": rows} if rows else {}
    return {
        "label": label, "role": role, "tokenizer_sha256": tokenizer, "context_lengths": curves, "passkey": found,
        "training": {"stages": [1, 2]} if role in ("trained", "control") else {},
    }  # fmt: skip


def test_verdict_on_context_lengths():
    base = model("base", "base", {1024: 11.0, 4096: 10.0, 16384: 410.0})
    mine = model("stage 2", "trained", {1024: 11.2, 4096: 10.03, 16384: 9.1})
    assert context_verdict([base, mine], "stage 2", 4096) == (
        "Context length on pg19 (512 tokens of 2 documents): at 4,096 tokens, within 0.3 % of base; "
        "at 16,384 tokens, perplexity 9.10 (base: 410.00). "
        "Beyond the training length it is better than base."
    )
    control = model("control", "control", {1024: 9.0, 4096: 9.0, 16384: 9.2})
    assert context_verdict([base, mine, control], "stage 2", 4096).endswith(
        "at 16,384 tokens, perplexity 9.10 (base: 410.00, control: 9.20). "
        "Beyond the training length it is better than base and about as good as control."
    )
    unfair = context_verdict([base, mine, control | {"training": {"stages": [1]}}], "stage 2", 4096)
    assert unfair == context_verdict([base, mine], "stage 2", 4096)
    alone = context_verdict([mine], "stage 2", None)
    assert alone == (
        "Context length on pg19 (512 tokens of 2 documents): at 1,024 tokens, perplexity 11.20; "
        "at 16,384 tokens, perplexity 9.10."
    )
    other = model("base", "base", {4096: 10.0, 16384: 410.0}, tokenizer="another")
    assert "base" not in context_verdict([other, mine], "stage 2", 4096)
    assert context_verdict([model("stage 2", "trained", {})], "stage 2", 4096) == ""


def test_verdict_on_passkeys():
    models = [model("base", "base", {}), model("stage 2", "trained", {})]
    assert passkey_verdict(models, "stage 2", 4096) == (
        "Passkey accuracy: 100 % (base: 100 %); beyond the training length 60 % (base: 0 %)."
    )

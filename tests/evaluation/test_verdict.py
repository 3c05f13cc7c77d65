"""The verdict, worked by hand: recovery, comparison with the base and with the control."""

import math

import pytest

from flare.evaluation.report.report import nope_pattern, report_verdict
from flare.evaluation.report.verdict import comparison_verdict, difference_percent, number, recovered_share
from tests.evaluation.example_results import STAGE2, example_results, four_rows, report, row


def test_recovered_share_worked_by_hand():
    assert recovered_share(2.0, 3.0, 3.0) == 0.0
    assert recovered_share(2.0, 3.0, 2.25) == 0.75
    assert recovered_share(2.0, 3.0, 2.0) == 1.0
    assert recovered_share(2.0, 3.0, 3.5) == -0.5
    assert recovered_share(2.0, 2.001, 1.9) is None


def test_difference_is_in_perplexity_or_bits_per_byte_for_different_tokenizers():
    base = row("base", "base", 2.0, bits=1.0)
    assert difference_percent(row("x", "trained", 2.0 + math.log(1.1)), base) == pytest.approx(10.0)
    other = row("x", "trained", 2.0 + math.log(1.1), tokenizer="t2", bits=0.9)
    assert difference_percent(other, base) == pytest.approx(-10.0)


def test_verdict_gives_the_loss_increase_each_stage_and_the_result():
    words = comparison_verdict(four_rows())
    assert words == (
        "Recovered: stage 2 is 3.0 % above base in perplexity on embedded (7.61 vs. 7.39). "
        "Removing RoPE increased the loss by 1.000 nats (from 2.000 to 3.000). "
        "After stage 1, 75 % of this increase was recovered; after stage 2, 97 % of this increase was recovered. "
        "Further training by itself also lowers the loss. Its share can only be measured with a control: the same "
        "training with RoPE kept. No control was compared."
    )


@pytest.mark.parametrize(
    ("loss", "opinion", "end"),
    [
        (2.025, "Success", "stage 2 is 0.5 % above control in perplexity on embedded (7.61 vs. 7.58)."),
        (1.9, "Recovered at a cost", "(7.61 vs. 6.69). This difference is the cost of removing RoPE."),
    ],
)
def test_fair_control_decides_the_verdict(loss, opinion, end):
    half = row("half", "control", 1.0, training={"stages": [1]})
    words = comparison_verdict([*four_rows(), row("control", "control", loss), half])  # whichever stands last
    assert words.startswith(f"{opinion}: stage 2 is 3.0 % above base") and words.endswith(end)
    assert "Control (the same training with RoPE kept): stage 2 is" in words


@pytest.mark.parametrize(
    ("control", "trained", "words"),
    [
        ({"stages": [1]}, {"stages": [1, 2]}, "it had stage 1 instead of stages 1 and 2"),
        ({"stages": [1, 2]}, {"stages": [2]}, "it had stages 1 and 2 instead of stage 2"),
        ({"stages": [2]}, {}, "the training of stage 2 is not recorded"),
        (
            {"stages": [2], "tokens of stage 2": 4_000_000, "data of stage 2": "5f", "learning_rate of stage 2": 3e-5},
            {"stages": [2], "tokens of stage 2": 8_000_000, "data of stage 2": "a1", "learning_rate of stage 2": 3e-5},
            "it had tokens of stage 2 4,000,000 instead of 8,000,000; different data of stage 2",
        ),
    ],
)
def test_control_with_different_training_allows_no_conclusion(tmp_path, control, trained, words):
    rows = [*four_rows()[:2], row("stage 2", "trained", STAGE2, training=trained)]
    rows.append(row("control", "control", 1.9, training=control))
    verdict = comparison_verdict(rows)
    assert verdict.startswith("Recovered: ") and "is the cost of removing RoPE" not in verdict
    assert verdict.endswith(
        f"The control is not a fair comparison: {words}. The cost of removing RoPE can only be measured with a control "
        "that had the same training."
    )
    text = report(tmp_path, example_results(), rows=rows, label="stage 2")
    assert text.splitlines()[2].endswith("perplexity 7.61 on embedded, +3.0 % vs. base.")  # not against control
    assert "Further training changes the loss by itself" in text


def test_verdict_with_a_control_and_no_base():
    words = comparison_verdict([row("stage 2", "trained", STAGE2), row("control", "control", 2.025)])
    assert words.startswith("Control (the same training with RoPE kept): stage 2 is 0.5 % above control")
    assert comparison_verdict([row("base", "base", 2.0), row("control", "control", 2.0)]) == ""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (2.06, "Not recovered"),
        (3.2, "even higher"),
        (1.9, "lower than that of the base"),
        (1.9, "Recovered: "),
        (2.05, "Recovered: "),
    ],
)
def test_verdict_for_other_final_losses(loss, expected):
    assert expected in comparison_verdict([*four_rows()[:2], row("stage 1", "trained", loss)])


def test_verdict_when_removing_rope_did_not_hurt():
    rows = [row("base", "base", 2.0), row("patched", "patched", 2.001), row("stage 1", "trained", 2.1)]
    words = comparison_verdict(rows)
    assert words.startswith("Not recovered") and "did not increase the loss" in words and "was recovered" not in words


def test_verdict_of_two_models_and_of_one():
    two = comparison_verdict([row("base", "base", 2.0), row("mine", "trained", 2.0)])
    assert two.startswith("mine is equal to base in perplexity on embedded (7.39 vs. 7.39). Further training")
    assert comparison_verdict([row("base", "base", 2.0)]) == ""
    assert "requires a second model" in report_verdict(example_results(), [])
    assert "has not been trained since" in comparison_verdict(four_rows()[:2])


def test_failed_probe_is_reported_first():
    results = example_results()
    results["model"]["nope_probe"] = {"verified": False, "layers": []}
    words = report_verdict(results, four_rows())
    assert words.startswith("The model does not match its configuration")
    assert "4-6" in words.split(".")[0] and "none" in words.split(".")[0]


def test_nope_patterns():
    assert nope_pattern([]) == "none"
    assert nope_pattern([3]) == "one"
    assert nope_pattern([20, 21, 22]) == "band"
    assert nope_pattern([3, 7, 11]) == "interleaved"
    assert nope_pattern([3, 4, 11]) == "mixed"


def test_format_of_numbers():
    assert [number(v) for v in (None, 7.389, 99999.0, 1.5e9)] == ["–", "7.39", "99999.00", "1.5e+09"]

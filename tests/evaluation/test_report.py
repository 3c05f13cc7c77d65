"""The verdict worked by hand, and what a reader finds in the report, the plots and TensorBoard."""

import itertools
import math
import re
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flare.evaluation.report.comparison_rows import ComparisonRow, comparison_row
from flare.evaluation.report.figures import Curves, Plot, draw_figures, shortened
from flare.evaluation.report.plots import (
    CONTROL_COLOR,
    count_label,
    cut_middle,
    plot_loss_by_position,
    plot_training_curve,
    series_colors,
    smoothed,
    spread,
    stage_spans,
)
from flare.evaluation.report.report import nope_pattern, report_verdict, write_report
from flare.evaluation.report.tensorboard import write_tensorboard
from flare.evaluation.report.verdict import comparison_verdict, difference_percent, number, won_back
from flare.evaluation.results import add_failure

BASE, PATCHED, STAGE1, STAGE2 = 2.0, 3.0, 2.25, 2.03


def row(label: str, role: str, loss: float, *, tokenizer: str = "t1", bits: float | None = None, training=None):
    if training is None and role in ("trained", "control"):
        training = {"stages": [1] if label == "stage 1" else [1, 2]}
    bits = bits or loss / 2
    return ComparisonRow(label, role, "embedded", loss, math.exp(loss), bits, tokenizer, training=training)


def four_rows() -> list[ComparisonRow]:
    return [
        row("base", "base", BASE),
        row("patched", "patched", PATCHED),
        row("stage 1", "trained", STAGE1),
        row("stage 2", "trained", STAGE2),
    ]


def hand_made(nope_layers=(4, 5, 6), loss: float = STAGE2) -> dict:
    layers = list(nope_layers)
    scored = {
        "status": "ok", "num_documents": 12, "num_tokens": 3456, "num_bytes": 12345, "num_words": 2000,
        "truncated_documents": 0, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": 0.8123,
        "word_perplexity": None, "byte_perplexity": 1.7561, "token_accuracy": 43.21,
        "loss_by_position": [
            {"from": 0, "to": 1, "loss": 4.0, "num_tokens": 12},
            {"from": 1, "to": 2, "loss": 3.0, "num_tokens": 11},
        ],
    }  # fmt: skip
    return {
        "schema_version": 1,
        "model": {
            "path": "/runs/my run/final_model", "model_type": "qwen2_nope", "nope_layers": layers, "rope_theta": 1e6,
            "num_parameters": 1234567, "tokenizer_sha256": "t1",
            "nope_probe": {"verified": True, "layers": layers},
        },
        "settings": {"protocol": "document", "max_length": 128, "prefix_token_id": 0, "precision": "fp32"},
        "environment": {"torch": "2.13.0"},
        "datasets": {"embedded": scored},
        "throughput": {"tokens_per_sec": 1234.5, "peak_memory_bytes": 2**30},
    }  # fmt: skip


# -- verdict ------------------------------------------------------------------------------------------


def test_share_won_back_worked_by_hand():
    assert won_back(2.0, 3.0, 3.0) == 0.0
    assert won_back(2.0, 3.0, 2.25) == 0.75
    assert won_back(2.0, 3.0, 2.0) == 1.0
    assert won_back(2.0, 3.0, 3.5) == -0.5
    assert won_back(2.0, 2.001, 1.9) is None


def test_difference_is_in_perplexity_and_for_another_tokenizer_in_bits_per_byte():
    base = row("base", "base", 2.0, bits=1.0)
    assert difference_percent(row("x", "trained", 2.0 + math.log(1.1)), base) == pytest.approx(10.0)
    other = row("x", "trained", 2.0 + math.log(1.1), tokenizer="t2", bits=0.9)
    assert difference_percent(other, base) == pytest.approx(-10.0)


def test_verdict_tells_the_jump_each_stage_and_the_end():
    words = comparison_verdict(four_rows())
    assert words == (
        "Won back: stage 2 is 3.0 % above base in perplexity on embedded (7.61 against 7.39). "
        "Removing RoPE raised the loss by 1.000 nats (2.000 to 3.000 nats); "
        "after stage 1 75 % of that was won back; after stage 2 97 % of that was won back. "
        "More training alone lowers the loss, too: how much of this it was, only the same training with RoPE kept can "
        "tell (the control, not compared here)."
    )


@pytest.mark.parametrize(
    ("loss", "opinion", "end"),
    [
        (2.025, "It worked", "stage 2 is 0.5 % above control in perplexity on embedded (7.61 against 7.58)."),
        (1.9, "Not for free", "(7.61 against 6.69). That is what removing RoPE costs here."),
    ],
)
def test_a_control_says_what_more_training_alone_would_have_done(loss, opinion, end):
    half = row("half", "control", 1.0, training={"stages": [1]})
    words = comparison_verdict([*four_rows(), row("control", "control", loss), half])  # whichever stands last
    assert words.startswith(f"{opinion}: stage 2 is 3.0 % above base") and words.endswith(end)
    assert "The same training with RoPE kept is the control: stage 2 is" in words


@pytest.mark.parametrize(
    ("control", "trained", "words"),
    [
        ({"stages": [1]}, {"stages": [1, 2]}, "it had stage 1 instead of stages 1 and 2"),
        ({"stages": [1, 2]}, {"stages": [2]}, "it had stages 1 and 2 instead of stage 2"),
        ({"stages": [2]}, {}, "what stage 2 went through is not recorded beside it"),
        (
            {"stages": [2], "tokens of stage 2": 4_000_000, "data of stage 2": "5f", "learning_rate of stage 2": 3e-5},
            {"stages": [2], "tokens of stage 2": 8_000_000, "data of stage 2": "a1", "learning_rate of stage 2": 3e-5},
            "it had tokens of stage 2 4,000,000 instead of 8,000,000; other data of stage 2",
        ),
    ],
)
def test_a_control_of_another_training_is_called_no_fair_one_and_nothing_is_concluded(
    tmp_path, control, trained, words
):
    rows = [*four_rows()[:2], row("stage 2", "trained", STAGE2, training=trained)]
    rows.append(row("control", "control", 1.9, training=control))
    verdict = comparison_verdict(rows)
    assert verdict.startswith("Won back: ") and "That is what removing RoPE costs" not in verdict
    assert verdict.endswith(
        f"The control is no fair one: {words}. What removing RoPE cost, only a control with the same training can "
        "tell."
    )
    text = report(tmp_path, hand_made(), rows=rows, label="stage 2")
    assert text.splitlines()[2].endswith("perplexity 7.61 on embedded, +3.0 % against base.")  # not against control
    assert "Training on more text changes the loss by itself" in text


def test_a_control_without_a_base_is_what_the_verdict_is_about():
    words = comparison_verdict([row("stage 2", "trained", STAGE2), row("control", "control", 2.025)])
    assert words.startswith("The same training with RoPE kept is the control: stage 2 is 0.5 % above control")
    assert comparison_verdict([row("base", "base", 2.0), row("control", "control", 2.0)]) == ""


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (2.06, "Not there yet"),
        (3.2, "higher still"),
        (1.9, "below the base's"),
        (1.9, "Won back"),
        (2.05, "Won back"),
    ],
)
def test_verdict_on_other_ends(loss, expected):
    assert expected in comparison_verdict([*four_rows()[:2], row("stage 1", "trained", loss)])


def test_verdict_when_removing_rope_did_not_hurt():
    rows = [row("base", "base", 2.0), row("patched", "patched", 2.001), row("stage 1", "trained", 2.1)]
    words = comparison_verdict(rows)
    assert words.startswith("Not there yet") and "did not hurt" in words and "won back" not in words


def test_verdict_of_two_models_and_of_one():
    two = comparison_verdict([row("base", "base", 2.0), row("mine", "trained", 2.0)])
    assert two.startswith("mine is equal to base in perplexity on embedded (7.39 against 7.39). More training alone")
    assert comparison_verdict([row("base", "base", 2.0)]) == ""
    assert "needs a second one" in report_verdict(hand_made(), [])
    assert "nothing has been trained" in comparison_verdict(four_rows()[:2])


def test_a_model_that_is_not_what_it_says_comes_before_every_number():
    results = hand_made()
    results["model"]["nope_probe"] = {"verified": False, "layers": []}
    words = report_verdict(results, four_rows())
    assert words.startswith("These numbers are not those of the configured model")
    assert "4-6" in words.split(".")[0] and "none" in words.split(".")[0]


def test_nope_patterns():
    assert nope_pattern([]) == "none"
    assert nope_pattern([3]) == "one"
    assert nope_pattern([20, 21, 22]) == "band"
    assert nope_pattern([3, 7, 11]) == "interleaved"
    assert nope_pattern([3, 4, 11]) == "mixed"


def test_numbers_stay_readable():
    assert [number(v) for v in (None, 7.389, 99999.0, 1.5e9)] == ["–", "7.39", "99999.00", "1.5e+09"]


# -- report -------------------------------------------------------------------------------------------


def report(tmp_path: Path, results: dict, plots=(), rows=None, **more) -> str:
    path = tmp_path / "evaluation_report.md"
    write_report(results, path, list(plots), rows, **more)
    return path.read_text(encoding="utf-8")


def test_first_three_lines_say_what_verdict_and_number(tmp_path):
    lines = report(tmp_path, hand_made(), rows=four_rows(), label="stage 2").splitlines()
    assert lines[0] == "# Evaluation of my run/final_model (qwen2_nope, NoPE layers: 4-6) on embedded"
    assert lines[1].startswith("**Verdict:** Won back: stage 2 is 3.0 % above base")
    assert lines[2] == "**The number:** perplexity 7.61 on embedded, +3.0 % against base."


def test_the_number_is_the_evaluated_models_whatever_stands_last(tmp_path):
    rows = [*four_rows(), row("control", "control", 1.9)]
    text = report(tmp_path, hand_made(), rows=rows, label="stage 2")
    assert text.splitlines()[2].endswith("perplexity 7.61 on embedded, +3.0 % against base, +13.9 % against control.")
    assert "- control: training with RoPE kept" in text
    assert "Training on more text changes the loss by itself" not in text  # the control is there


def test_tables_hold_the_numbers_and_have_equal_columns(tmp_path):
    text = report(tmp_path, hand_made(), rows=four_rows())
    assert "| patched | 3.0000 | 20.09 | 1.5000 | +171.8 % | – |" in text
    assert "| base | 2.0000 | 7.39 | 1.0000 | – | – |" in text
    assert "| embedded | 7.61 | 2.0300 | 0.8123 | – | 1.7561 | 43.21 % | 12 | 3,456 | 0 |" in text
    assert "| peak memory | 1.00 GiB |" in text
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    for setting in ("protocol | document", "max length | 128", "prefix token id | 0", "tokenizer SHA-256 | t1"):
        assert f"| {setting} |" in text


def test_another_tokenizer_is_marked_and_compared_in_bits_per_byte(tmp_path):
    rows = [row("base", "base", 2.0, bits=1.0), row("other", "trained", 1.0, tokenizer="t2", bits=1.1)]
    text = report(tmp_path, hand_made(), rows=rows, label="other")
    assert "| other | 1.0000 \\* | 2.72 \\* | 1.1000 | +10.0 % \\* | – |" in text
    assert "may not be compared" in text
    assert text.splitlines()[2] == "**The number:** 0.8123 bits per byte on embedded, +10.0 % against base."
    assert "may not be compared" not in report(tmp_path, hand_made(), rows=four_rows())


def test_plots_are_linked_relative_to_the_report_and_come_with_their_sentence(tmp_path):
    plots = [Plot(tmp_path / "plots" / "loss by position.png", "plots/x", "Lower is better.")]
    assert "(plots/loss%20by%20position.png)\n\nLower is better." in report(tmp_path, hand_made(), plots)


def test_failed_data_sets_are_named_with_their_error_in_one_line(tmp_path):
    results = hand_made()
    add_failure(results, "a|b", "two\nlines <html>")
    text = report(tmp_path, results)
    assert "- a\\|b: two lines &lt;html>" in text
    assert "1 of 2 data sets could not be scored" in text
    results["datasets"].pop("embedded")
    assert report(tmp_path, results).splitlines()[2] == "**The number:** none."


def test_notes_fit_the_layout_of_the_nope_layers(tmp_path):
    band, interleaved, plain = (report(tmp_path, hand_made(layers)) for layers in ((4, 5, 6), (3, 7, 11), ()))
    assert "hardly extrapolates" in band and "every:4" in band
    assert "are interleaved, the layout that extrapolates" in interleaved
    assert "## Notes" not in plain
    assert "--no_rope_layers none" in report(tmp_path, hand_made(()), rows=four_rows())
    both = hand_made(())
    for name in ("wikitext-2", "wikitext-103"):
        both["datasets"][name] = both["datasets"]["embedded"]
    assert "share their test set" in report(tmp_path, both)


# -- plots and TensorBoard ----------------------------------------------------------------------------


def test_parts_of_the_plots_worked_by_hand():
    history = {"stage1": {"train": [(10, 3.0), (20, 2.0)], "eval": [(25, 2.5)]}, "stage2": {"train": [(7, 1.0)]}}
    assert stage_spans(history) == [("stage1", 0.0, 25.0), ("stage2", 25.0, 32.0)]
    assert smoothed([1.0, 2.0, 6.0, 4.0], span=3) == [1.5, 3.0, 4.0, 5.0]
    labels = ["base", "patched, untrained", "stage 1", "stage 2", "control (stage 2)"]
    assert series_colors(labels)[2:] == [*series_colors(["stage 1", "stage 2"]), CONTROL_COLOR]
    assert len(set(series_colors([*labels, "a", "b"]))) == 7
    assert [count_label(v) for v in (0, 512, 1500, 2e6, 4e9)] == ["0", "512", "1.5k", "2M", "4B"]
    heights = [height for height, _ in spread([(0.5, "b"), (0.49, "a"), (0.9, "c")], gap=0.05)]
    assert heights == pytest.approx([0.49, 0.54, 0.9])
    assert all(after - before >= 0.05 - 1e-9 for before, after in itertools.pairwise(heights))


def test_plots_are_drawn_and_a_diverged_run_too(tmp_path):
    buckets = hand_made()["datasets"]["embedded"]["loss_by_position"]
    position = plot_loss_by_position({"$a$ 中文": buckets, "b": buckets}, tmp_path / "plots" / "position.png")
    history = {"stage 1": {"train": [(1, 3.0), (2, math.nan)], "eval": [(2, 2.5)]}, "stage 2": {"train": []}}
    curve = plot_training_curve(history, tmp_path / "curve.png", {"base": 2.0}, [(0, 2.0), (2, 1.9)])
    empty = plot_training_curve({}, tmp_path / "empty.png")
    for path in (position, curve, empty):
        with Image.open(path) as image:
            assert image.width > 800
    with Image.open(curve) as image, Image.open(empty) as blank:
        assert len(image.getcolors(1 << 20)) > len(blank.getcolors(1 << 20))


def events_of(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def test_tensorboard_holds_scalars_the_curves_of_every_model_the_tables_and_the_plots(tmp_path):
    results = hand_made()
    add_failure(results, "missing", "no file")
    curve = [{"context_length": n, "perplexity": p} for n, p in ((64, 9.0), (128, None))]
    results["context_lengths"] = {"embedded": curve}
    scores = {"datasets": {"embedded": {"perplexity": 7.0}}, "context_lengths": {"embedded": curve}}
    results["milestones"] = [{"label": "base (a/b)", **scores}, {"label": "stage 2"}]
    picture = plot_loss_by_position({"a": results["datasets"]["embedded"]["loss_by_position"]}, tmp_path / "p.png")
    plots = [Plot(picture, "plots/loss_by_position", "")]
    for _ in range(2):  # an evaluation before leaves nothing behind
        write_tensorboard(results, tmp_path / "tb", plots, "stage 2", "# Title\n| a | b |\n\n## Plots\n![x](y)")
    events, other = events_of(tmp_path / "tb"), events_of(tmp_path / "tb" / "base (a_b)")
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert scalars["results/embedded/perplexity"][0].value == pytest.approx(math.exp(STAGE2), rel=1e-6)
    assert [(e.step, e.value) for e in scalars["by_position/embedded"]] == [(0, 4.0), (1, 3.0)]
    assert "results/embedded/word_perplexity" not in scalars  # overflowed: None
    assert not any("missing" in tag for tag in scalars)
    assert events.Tags()["images"] == ["plots/loss_by_position"]
    assert events.Tensors("report/text_summary")[0].tensor_proto.string_val[0] == b"# Title\n| a | b |\n"
    for run in (events, other):
        assert [(e.step, e.value) for e in run.Scalars("by_context/embedded")] == [(64, 9.0)]
    assert other.Scalars("results/embedded/perplexity")[0].value == 7.0
    assert not (tmp_path / "tb" / "stage 2").exists()


def test_an_evaluation_beside_trainings_curves_leaves_them(tmp_path):
    """--output_dir may be the experiment itself, whose tensorboard/ holds the curves of its stages."""
    curve = tmp_path / "stage1" / "events.out.tfevents.1.host.1.0"
    curve.parent.mkdir()
    curve.write_bytes(b"training's")
    write_tensorboard(hand_made(), tmp_path, [], "stage 2", "# Title")
    assert curve.read_bytes() == b"training's"
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_data_sets_whose_files_share_a_name_have_pictures_of_their_own(tmp_path):
    buckets = hand_made()["datasets"]["embedded"]["loss_by_position"]
    sets = {"en/test.jsonl": {"a": buckets}, "de/test.jsonl": {"a": buckets}, "test.jsonl_2": {"a": buckets}}
    plots = draw_figures(hand_made(), "a", sets, Curves({}, []), tmp_path)
    assert len({plot.path for plot in plots}) == 3
    assert all(plot.path.is_file() for plot in plots)


def test_long_names_leave_room_for_the_lines():
    assert shortened("short") == "short"
    assert shortened("/home/someone/data/de/test.jsonl", 14) == "…de/test.jsonl"
    assert cut_middle("stage 2 (first_experiment_of_all)", 21) == "stage 2 (f…nt_of_all)"


def test_comparison_row_of_a_results_file():
    made = comparison_row("stage 2", "trained", hand_made(), "embedded")
    assert made == ComparisonRow("stage 2", "trained", "embedded", STAGE2, math.exp(STAGE2), 0.8123, "t1")

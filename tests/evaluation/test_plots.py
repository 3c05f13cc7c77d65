"""Plots and TensorBoard events of an evaluation."""

import itertools
import math
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
from flare.evaluation.report.tensorboard import write_tensorboard
from flare.evaluation.results import add_failure
from tests.evaluation.example_results import STAGE2, example_results


def test_plot_helpers_worked_by_hand():
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


def test_plots_are_drawn_for_a_diverged_run(tmp_path):
    buckets = example_results()["datasets"]["embedded"]["loss_by_position"]
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


def test_tensorboard_contains_scalars_curves_tables_and_plots(tmp_path):
    results = example_results()
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


def test_tensorboard_events_of_training_are_kept(tmp_path):
    """--output_dir may be the experiment itself, whose tensorboard/ holds the curves of its stages."""
    curve = tmp_path / "stage1" / "events.out.tfevents.1.host.1.0"
    curve.parent.mkdir()
    curve.write_bytes(b"training's")
    write_tensorboard(example_results(), tmp_path, [], "stage 2", "# Title")
    assert curve.read_bytes() == b"training's"
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_data_sets_with_the_same_file_name_get_separate_plots(tmp_path):
    buckets = example_results()["datasets"]["embedded"]["loss_by_position"]
    sets = {"en/test.jsonl": {"a": buckets}, "de/test.jsonl": {"a": buckets}, "test.jsonl_2": {"a": buckets}}
    plots = draw_figures(example_results(), "a", sets, Curves({}, []), tmp_path)
    assert len({plot.path for plot in plots}) == 3
    assert all(plot.path.is_file() for plot in plots)


def test_long_names_are_shortened():
    assert shortened("short") == "short"
    assert shortened("/home/someone/data/de/test.jsonl", 14) == "…de/test.jsonl"
    assert cut_middle("stage 2 (first_experiment_of_all)", 21) == "stage 2 (f…nt_of_all)"

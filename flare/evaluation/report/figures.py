"""The plots of an evaluation, each with a caption that explains how to read it."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flare.evaluation.report.plots import plot_loss_by_position, plot_training_curve
from flare.evaluation.report.plots_context import plot_context_lengths, plot_passkey
from flare.files import file_name


@dataclass(frozen=True)
class Plot:
    """A PNG file, its tag in TensorBoard, and its caption."""

    path: Path
    tag: str
    sentence: str


@dataclass(frozen=True)
class Curves:
    """Training curves: the stages of the experiment's training_metrics.json (or {}), and the curve of the control on
    the same held-out documents (``recovery.control_curve``; or [])."""

    stages: dict
    control: list[dict]


def draw_figures(
    results: dict, label: str, by_position: dict[str, dict[str, list[dict]]], curves: Curves, directory: Path
) -> list[Plot]:
    """Draw all plots that the results allow, the most important first.

    Args:
        results: the complete content of evaluation_results.json.
        label: label of the evaluated model.
        by_position: data set -> label of a model -> position buckets.
    """
    trained = training_length(curves.stages)
    files = plot_file_names([*by_position, *(results.get("context_lengths") or {})])
    plots = [*_training_curve(results, curves, directory), *_context_plots(results, label, trained, directory, files)]
    plots += _passkey_plot(results, label, trained, directory)
    for name, series in by_position.items():
        path = directory / f"loss_by_position_{files[name]}.png"
        plot_loss_by_position(series, path, trained, shortened(name))
        sentence = (
            f"Loss on {name} by position in the window. It should fall towards the right, because later tokens have "
            "more context. A rise at the end means that the model cannot use these positions."
        )
        plots.append(Plot(path, f"plots/loss_by_position/{name}", sentence))
    return plots


def plot_file_names(datasets: Iterable[str]) -> dict[str, str]:
    """Data set -> a unique part of a file name, also for en/test.jsonl and de/test.jsonl."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(datasets):
        taken = set(found.values())
        candidates = (file_name(name) + (f"_{count}" if count > 1 else "") for count in itertools.count(1))
        found[name] = next(candidate for candidate in candidates if candidate not in taken)
    return found


def shortened(name: str, limit: int = 36) -> str:
    """A name that fits in a title: of a long path, the end is kept because it identifies the file."""
    return name if len(name) <= limit else "…" + name[-(limit - 1) :]


def training_length(stages: dict) -> int | None:
    """The longest training sequence of all stages, in tokens."""
    lengths = ((block.get("settings") or {}).get("max_seq_length") for block in stages.values())
    return max((length for length in lengths if length), default=None)


def training_history(stages: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Loss curves of the stages, with tokens counted from the start of each stage."""
    history = {}
    for stage, block in sorted(stages.items()):
        records = block.get("history", [])
        history[f"stage {stage}"] = {
            "train": [(r["tokens"], r["loss"]) for r in records if "loss" in r],
            "eval": [(r["tokens"], r["eval_loss"]) for r in records if "eval_loss" in r],
        }
    return {name: curves for name, curves in history.items() if curves["train"]}


def _training_curve(results: dict, curves: Curves, directory: Path) -> list[Plot]:
    history = training_history(curves.stages)
    if not history:
        return []
    recovery, references = results.get("recovery"), {}
    sentence = "Loss during training, over all stages. Dots: held-out documents. Thin lines: training batches."
    if recovery:
        references = {
            "RoPE removed, untrained": recovery["untrained_loss"], "base, RoPE everywhere": recovery["base_loss"]
        }  # fmt: skip
        sentence += (
            " Removing RoPE raises the loss from the lower dashed line (base) to the upper one. Training should bring "
            "the dots back to the lower line."
        )
    if curves.control:
        sentence += (
            " The squares are the control: the same training with RoPE kept. The distance between the last square and "
            "the last dot is the cost of removing RoPE."
        )
    elif recovery:
        sentence += (
            " They can fall below the base because of the additional training. A control (the same training with RoPE "
            "kept) measures this effect."
        )
    control = [(point["tokens"], point["loss"]) for point in curves.control]
    path = plot_training_curve(history, directory / "training_curve.png", references, control)
    return [Plot(path, "plots/training_curve", sentence)]


def models_of(results: dict, label: str) -> list[dict]:
    """The compared models (``milestones``), or the evaluated model if there is no comparison."""
    single = {key: results.get(key) or {} for key in ("datasets", "context_lengths", "passkey")}
    return results.get("milestones") or [{"label": label, "role": "trained", **single}]


def _context_plots(
    results: dict, label: str, trained: int | None, directory: Path, files: dict[str, str]
) -> list[Plot]:
    plots = []
    for name in results.get("context_lengths") or {}:
        models = {m["label"]: m["context_lengths"].get(name) for m in models_of(results, label)}
        series = {model: rows for model, rows in models.items() if rows}
        path = directory / f"context_length_{files[name]}.png"
        plot_context_lengths(series, path, trained, shortened(name))
        sentence = (
            f"Perplexity of the last tokens of the long documents of {name}, with increasing context. The scored "
            "tokens are the same at every length. For a model that extrapolates, the curve stays low to the right of the "
            "training length; otherwise it rises steeply."
        )
        plots.append(Plot(path, f"plots/context_length/{name}", sentence))
    return plots


def _passkey_plot(results: dict, label: str, trained: int | None, directory: Path) -> list[Plot]:
    models = {m["label"]: m["passkey"] for m in models_of(results, label) if m.get("passkey")}
    if not models:
        return []
    path = plot_passkey(models, directory / "passkey.png", trained)
    sentence = (
        "Passkey accuracy (%): how often the model retrieves a number that is hidden in filler text, by length of the "
        "text and depth of the number (0: at the start). Top: every token of the number has the highest probability. "
        "Bottom: the generated text contains the number."
    )
    return [Plot(path, "plots/passkey", sentence)]

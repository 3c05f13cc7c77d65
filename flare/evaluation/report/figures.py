"""Which pictures an evaluation has, and the sentence that goes with each."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flare.evaluation.report.plots import plot_loss_by_position, plot_training_curve
from flare.evaluation.report.plots_context import plot_context_lengths, plot_passkey
from flare.files import file_name


@dataclass(frozen=True)
class Plot:
    """A PNG, its tag in TensorBoard's image tab, and how to read it."""

    path: Path
    tag: str
    sentence: str


@dataclass(frozen=True)
class Curves:
    """What training recorded: the stages of the experiment's training_metrics.json, or {}; and the control's curve on
    the same held-out documents (``recovery.control_curve``), or []."""

    stages: dict
    control: list[dict]


def draw_figures(
    results: dict, label: str, by_position: dict[str, dict[str, list[dict]]], curves: Curves, directory: Path
) -> list[Plot]:
    """Draw what the results have, the most telling first.

    Args:
        results: of evaluation_results.json, complete.
        label: of the evaluated model among those that it is compared with.
        by_position: data set -> model -> buckets.
    """
    trained = training_length(curves.stages)
    files = picture_names([*by_position, *(results.get("context_lengths") or {})])
    plots = [*_training_curve(results, curves, directory), *_contexts(results, label, trained, directory, files)]
    plots += _passkey(results, label, trained, directory)
    for name, series in by_position.items():
        path = directory / f"loss_by_position_{files[name]}.png"
        plot_loss_by_position(series, path, trained, shortened(name))
        sentence = (
            f"Loss on {name} by position in the window: it should fall to the right, as more context helps; a line "
            "that turns up has lost its way."
        )
        plots.append(Plot(path, f"plots/loss_by_position/{name}", sentence))
    return plots


def picture_names(datasets: Iterable[str]) -> dict[str, str]:
    """Data set -> its name in the pictures' file names; en/test.jsonl and de/test.jsonl are two files."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(datasets):
        taken = set(found.values())
        candidates = (file_name(name) + (f"_{count}" if count > 1 else "") for count in itertools.count(1))
        found[name] = next(candidate for candidate in candidates if candidate not in taken)
    return found


def shortened(name: str, limit: int = 36) -> str:
    """The end of a long name, as much as a title holds: of a path that is what tells files apart."""
    return name if len(name) <= limit else "…" + name[-(limit - 1) :]


def training_length(stages: dict) -> int | None:
    """The longest row that the stages trained on, in tokens."""
    lengths = ((block.get("settings") or {}).get("max_seq_length") for block in stages.values())
    return max((length for length in lengths if length), default=None)


def training_history(stages: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Curves of the stages of a training_metrics.json, tokens counted from each stage's own start."""
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
    sentence = "Loss while training, over all stages; dots: held-out documents, thin: training batches."
    if recovery:
        references = {
            "RoPE removed, untrained": recovery["untrained_loss"], "base, RoPE everywhere": recovery["base_loss"]
        }  # fmt: skip
        sentence += (
            " Removing RoPE lifts the loss from the lower dashed line (the base) to the upper one; training brings "
            "the dots down again."
        )
    if curves.control:
        sentence += (
            " The squares are the control, the base after the same training with RoPE kept: what lies between its end "
            "and the last dot is what removing RoPE cost."
        )
    elif recovery:
        sentence += (
            " Below the base they may fall because more text was seen: only a control, the same training with RoPE "
            "kept, tells how far."
        )
    control = [(point["tokens"], point["loss"]) for point in curves.control]
    path = plot_training_curve(history, directory / "training_curve.png", references, control)
    return [Plot(path, "plots/training_curve", sentence)]


def models_of(results: dict, label: str) -> list[dict]:
    """The models that there are numbers of: the milestones, or the evaluated one alone."""
    alone = {key: results.get(key) or {} for key in ("datasets", "context_lengths", "passkey")}
    return results.get("milestones") or [{"label": label, "role": "trained", **alone}]


def _contexts(results: dict, label: str, trained: int | None, directory: Path, files: dict[str, str]) -> list[Plot]:
    plots = []
    for name in results.get("context_lengths") or {}:
        models = {m["label"]: m["context_lengths"].get(name) for m in models_of(results, label)}
        series = {model: rows for model, rows in models.items() if rows}
        path = directory / f"context_length_{files[name]}.png"
        plot_context_lengths(series, path, trained, shortened(name))
        sentence = (
            f"Perplexity of the same last tokens of the long documents of {name}, with more and more context before "
            "them: a model that extrapolates stays low to the right of the training length, one that does not shoots "
            "up."
        )
        plots.append(Plot(path, f"plots/context_length/{name}", sentence))
    return plots


def _passkey(results: dict, label: str, trained: int | None, directory: Path) -> list[Plot]:
    models = {m["label"]: m["passkey"] for m in models_of(results, label) if m.get("passkey")}
    if not models:
        return []
    path = plot_passkey(models, directory / "passkey.png", trained)
    sentence = (
        "Passkey: how often (in percent) each model finds a number hidden in noise, by the length of the text and the "
        "depth at which the number stands; top: every token of it is the model's first choice; bottom: it stands in "
        "what the model writes."
    )
    return [Plot(path, "plots/passkey", sentence)]

"""Plots of the report, drawn with matplotlib and written as PNG files.

Labels are next to the lines where space allows. The colors are distinguishable for color-blind readers.
"""

import itertools
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito, Color Universal Design (2008); its yellow is too light for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
REFERENCE_COLOR = "#666666"
CONTROL_COLOR = "#000000"
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "SimHei", "PingFang SC")
SIZE_INCHES = (8.0, 4.5)
DPI = 130
TRAINING_AXIS = "tokens trained (dots: held-out documents, thin: training batches)"
LABEL_GAP = 0.055
"""Smallest distance between two labels at the right edge, as a share of the axis."""


def plot_loss_by_position(
    series: dict[str, list[dict]], path: Path | str, training_length: int | None = None, name: str = ""
) -> Path:
    """Mean NLL against the position in the window.

    Args:
        series: label -> buckets ``{"from", "to", "loss", "num_tokens"}`` of ``DatasetScore``.
        path: the PNG to write. name: of the data set.
        training_length: longest row of the training, marked when it is inside the plot.
    """
    with style():
        on = f" on {name}" if name else ""
        figure, axes = new_axes(f"Loss by position{on}: the effect of more context", "tokens seen")
        ends = []
        for color, (label, buckets) in zip(series_colors(series), series.items(), strict=True):
            # Position p has seen p + 1 tokens; a bucket is drawn at the geometric mean of what it has seen.
            seen = [((bucket["from"] + 1) * bucket["to"]) ** 0.5 for bucket in buckets]
            losses = [bucket["loss"] for bucket in buckets]
            axes.plot(seen, losses, color=color, marker="o", markersize=3.5)
            ends.append((losses[-1], label, color))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        mark_training_length(axes, training_length)
        label_right(axes, ends)
        return save(figure, path)


def plot_training_curve(
    history: dict[str, dict[str, list[tuple[float, float]]]],
    path: Path | str,
    references: dict[str, float] | None = None,
    control: Sequence[tuple[float, float]] = (),
) -> Path:
    """Loss against tokens of training, with all stages on one axis.

    Args:
        history: stage name -> ``{"train": [(tokens, loss)], "eval": [(tokens, loss)]}``, tokens counted
            from that stage's own start, stages in order of training.
        references: label -> loss, drawn as horizontal lines (the base, the untrained patched model). They must be
            measured on the documents of the eval points.
        control: (tokens over all stages, loss) of the control, on the same documents.
    """
    spans = stage_spans(history)
    references = references or {}
    with style():
        title = "Loss increase after removing RoPE, and its recovery" if references else "Loss during training"
        figure, axes = new_axes(title, TRAINING_AXIS, title_pad=24)
        shown = list(references.values())
        named = [(loss, f"{label} {loss:.3f}", REFERENCE_COLOR) for label, loss in references.items()]
        for color, (stage, start, end) in zip(series_colors(stage for stage, *_ in spans), spans, strict=True):
            last = end == spans[-1][2]
            shown += _draw_stage(axes, history[stage], start, color)
            _name_span(axes, stage, start, end, color)
            named += _label_end(axes, stage, history[stage].get("eval", []), start, color, last)
        if control:
            _draw_control(axes, control)
            shown += [loss for _, loss in control]
            named.append((control[-1][1], f"control, RoPE kept {control[-1][1]:.3f}", CONTROL_COLOR))
        _zoom(axes, shown)
        for loss in references.values():
            axes.axhline(loss, color=REFERENCE_COLOR, linestyle=(0, (5, 3)), linewidth=1.2, zorder=1)
        axes.set_xlim(0, max([end for *_, end in spans], default=0.0) or 1.0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count_label(value)))
        label_right(axes, named)
        return save(figure, path)


def stage_spans(history: dict[str, dict[str, list]]) -> list[tuple[str, float, float]]:
    """(stage, first token, last token) on the shared axis; each stage starts at the end of the previous one."""
    spans, start = [], 0.0
    for stage, curves in history.items():
        end = start + max((tokens for curve in curves.values() for tokens, _ in curve), default=0.0)
        spans.append((stage, start, end))
        start = end
    return spans


def _draw_stage(axes: Axes, curves: dict, start: float, color: str) -> list[float]:
    """Draw one stage from ``start`` tokens on; returns the losses that the axis must show."""
    train, evaluated = curves.get("train", []), curves.get("eval", [])
    tokens = [start + count for count, _ in train]
    smooth = smoothed([loss for _, loss in train])
    axes.plot(tokens, [loss for _, loss in train], color=color, alpha=0.25, linewidth=0.8)
    axes.plot(tokens, smooth, color=color, alpha=0.6, linewidth=1.4)
    axes.plot(
        [start + count for count, _ in evaluated],
        [loss for _, loss in evaluated],
        color=color, marker="o", markersize=5, linewidth=2.0, markeredgecolor="white", zorder=3,
        clip_on=False,
    )  # fmt: skip
    return smooth + [loss for _, loss in evaluated]


def _draw_control(axes: Axes, control: Sequence[tuple[float, float]]) -> None:
    axes.plot(
        *zip(*control, strict=True), color=CONTROL_COLOR, marker="s", markersize=4.5, linewidth=1.6,
        markeredgecolor="white", zorder=2, clip_on=False,
    )  # fmt: skip


def _name_span(axes: Axes, stage: str, start: float, end: float, color: str) -> None:
    """Write the name of the stage above its part of the axis, and draw a line at its start."""
    if start:
        axes.axvline(start, color="#999999", linewidth=0.8, linestyle=":")
    axes.text(
        (start + end) / 2, 1.015, stage, transform=axes.get_xaxis_transform(), color=color,
        ha="center", va="bottom", fontweight="bold", fontsize=10,
    )  # fmt: skip


def _zoom(axes: Axes, losses: list[float]) -> None:
    """Fit the y axis to smoothed training losses and evaluations; single noisy steps may be cut off."""
    finite = [loss for loss in losses if math.isfinite(loss)]  # a run that diverged is still drawn
    if finite:
        low, high = min(finite), max(finite)
        margin = 0.08 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _label_end(
    axes: Axes, stage: str, evaluated: list, start: float, color: str, last: bool
) -> list[tuple[float, str, str]]:
    """Write a stage's last evaluation at its point; the last stage's is returned for the right edge."""
    if not evaluated:
        return []
    tokens, loss = evaluated[-1]
    if last:
        return [(loss, f"{stage} {loss:.3f}", color)]
    axes.annotate(
        f"{loss:.3f}", (start + tokens, loss), (5, 13), textcoords="offset points", color=color, fontsize=9.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    return []


def smoothed(values: list[float], span: int | None = None) -> list[float]:
    """Mean of the ``span`` values around each, fewer at the ends. Default: a twentieth of all, at least 5."""
    half = (span or max(5, len(values) // 20)) // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def count_label(value: float) -> str:
    """1500 -> '1.5k', 2e6 -> '2M': counts as an axis shows them."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def mark_training_length(axes: Axes, length: int | None) -> None:
    """Draw a vertical line at the training length if it is inside the plot."""
    low, high = axes.get_xlim()
    if length is None or not low < length < high:
        return
    axes.axvline(length, color=REFERENCE_COLOR, linewidth=1.2, linestyle=":", zorder=1)
    axes.text(
        length, 1.0, f" training length {length:,}", transform=axes.get_xaxis_transform(), color=REFERENCE_COLOR,
        ha="left", va="top", fontsize=9,
    )  # fmt: skip


def new_axes(
    title: str, xlabel: str, ylabel: str = "loss (nats per token)", title_pad: int = 10
) -> tuple[Figure, Axes]:
    """A figure with empty axes."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, pad=title_pad)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def label_right(axes: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Write each label at the right edge at the height of its value, moved if two would overlap."""
    heights = []
    for value, label, color in ends:
        pixel = axes.transData.transform((axes.get_xlim()[1], value))[1]
        heights.append((axes.transAxes.inverted().transform((0, pixel))[1], (label, color)))
    for height, (label, color) in spread(heights, LABEL_GAP):
        axes.text(
            1.015, height, cut_middle(label), transform=axes.transAxes, color=color,
            va="center", ha="left", fontsize=9.5,
        )  # fmt: skip


def cut_middle(label: str, limit: int = 32) -> str:
    """Shorten a long label in the middle, because its ends identify the model."""
    half = (limit - 1) // 2
    return label if len(label) <= limit else f"{label[:half]}…{label[-half:]}"


def spread(items: list[tuple[float, tuple]], gap: float) -> list[tuple[float, tuple]]:
    """Heights in ascending order, each at least ``gap`` above the one below; those pushed over the top (1) go down
    again as far as there is room."""
    placed: list[tuple[float, tuple]] = []
    for height, content in sorted(items, key=lambda item: item[0]):
        if placed:
            height = max(height, placed[-1][0] + gap)
        placed.append((height, content))
    ceiling = 1.0
    for index in reversed(range(len(placed))):
        height, content = placed[index]
        placed[index] = (min(height, ceiling), content)
        ceiling = placed[index][0] - gap
    return placed


def series_colors(labels: Iterable[str]) -> list[str]:
    """One color for each label; base, control and stages have the same color in every plot."""
    known = {"base": REFERENCE_COLOR, "stage 1": COLORS[0], "stage 2": COLORS[1]}
    others = itertools.cycle(COLORS[2:])
    return [CONTROL_COLOR if name.startswith("control") else known.get(name) or next(others) for name in labels]


def style():
    """Style of the plots: fonts for Chinese names if installed, and no math mode for '$' in a name."""
    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]
    return rc_context(
        {
            "font.family": families,
            "text.parse_math": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#888888",
        }
    )


def save(figure: Figure, path: Path | str) -> Path:
    """Write the PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A Chinese name on a machine without a Chinese font: boxes in the plot, but no warnings on the terminal.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(path, format="png", facecolor="white")
    return path

"""Plots of behavior beyond the training length: perplexity by context length, and passkey heat maps."""

import math
import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from flare.evaluation.report.plots import DPI, label_right, mark_training_length, new_axes, save, series_colors, style

PASSKEY_COLORS = "cividis"  # ordered in lightness for every kind of colour vision (Nunez et al. 2018)
KINDS = {"accuracy": "first choice", "generated_accuracy": "written"}


def plot_context_lengths(
    series: dict[str, list[dict]], path: Path | str, training_length: int | None, name: str
) -> Path:
    """Perplexity against context length, both on logarithmic axes.

    Args:
        series: model -> rows ``{"context_length", "loss", ...}`` of ``score_context_lengths``.
    """
    with style():
        figure, axes = new_axes(f"Perplexity by context length on {name}", "context (tokens)", "perplexity")
        ends = []
        for color, (label, rows) in zip(series_colors(series), series.items(), strict=True):
            lengths = [row["context_length"] for row in rows]
            # Larger perplexities are drawn at 1e12, so that the axis stays readable.
            values = [math.exp(min(row["loss"], math.log(1e12))) for row in rows]
            axes.plot(lengths, values, color=color, marker="o", markersize=5, linewidth=2, markeredgecolor="white")
            ends.append((values[-1], f"{label} {short(values[-1])}", color))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row["context_length"] for rows in series.values() for row in rows})
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _few_ticks(axes)
        mark_training_length(axes, training_length)
        label_right(axes, ends)
        return save(figure, path)


def _few_ticks(axes: Axes) -> None:
    """Readable ticks on a logarithmic axis, also if it spans less than a decade."""
    low, high = axes.get_ylim()
    if high / low < 1.2:
        low, high = low / 1.1, high * 1.1
        axes.set_ylim(low, high)
    steps = (1, 2, 5) if high / low > 12 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    candidates = [m * 10.0**e for e in range(-3, 13) for m in steps]
    ticks = [tick for tick in candidates if low <= tick <= high]
    step = max(1, math.ceil(len(ticks) / 7))
    if len(ticks) < 3:
        ticks, step = [low + (high - low) * i / 4 for i in range(5)], 1
    axes.yaxis.set_major_locator(FixedLocator(ticks[::step]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A perplexity as a label: three digits, commas from 1,000, scientific notation from a million."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot_passkey(models: dict[str, list[dict]], path: Path | str, training_length: int | None) -> Path:
    """Heat maps of passkey accuracy by length (x) and depth (y), with one column for each model.

    Args:
        models: label -> rows ``{"context_length", "depth_percent", "accuracy", "generated_accuracy"}``.
    """
    kinds = [k for k in KINDS if any(row.get(k) is not None for rows in models.values() for row in rows)]
    cells = max(len({row["context_length"] for row in rows}) for rows in models.values())
    width = max(4.0, 1.4 + len(models) * max(1.6, 0.62 * cells))
    with style():
        figure = Figure(figsize=(width, 0.9 + 2.0 * len(kinds)), dpi=DPI, layout="constrained")
        grid = figure.subplots(len(kinds), len(models), squeeze=False)
        for column, (label, rows) in enumerate(models.items()):
            for line, kind in enumerate(kinds):
                axes = grid[line][column]
                _heat_map(axes, rows, kind, training_length)
                if line == 0:
                    characters = int(11 * width / len(models))  # an inch holds about 12 of them
                    axes.set_title(textwrap.fill(label, max(characters, 8)), fontsize=10, pad=16)
                if line == len(kinds) - 1:
                    axes.set_xlabel("context (tokens)", fontsize=9)
                if column == 0:
                    axes.set_ylabel(f"{KINDS[kind]}\ndepth (%)", fontsize=9)
                else:
                    axes.set_yticklabels([])
        figure.suptitle("Passkey accuracy (%)", fontsize=12, x=0.01, ha="left")
        return save(figure, path)


def _heat_map(axes: Axes, rows: list[dict], kind: str, training_length: int | None) -> None:
    lengths = sorted({row["context_length"] for row in rows})
    depths = sorted({row["depth_percent"] for row in rows})
    found = {(row["depth_percent"], row["context_length"]): row.get(kind) for row in rows}
    values = [[found.get((depth, length)) for length in lengths] for depth in depths]
    shown = [[math.nan if value is None else value for value in line] for line in values]
    axes.imshow(shown, cmap=PASSKEY_COLORS, vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value is not None:
                color = "black" if value > 48 else "white"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8.5)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axes.set_yticks(range(len(depths)), [str(depth) for depth in depths], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    inside = sum(length <= training_length for length in lengths) if training_length else 0
    if 0 < inside < len(lengths):  # a line between lengths up to and beyond the training length
        axes.axvline(inside - 0.5, color="white", linewidth=3)
        axes.axvline(inside - 0.5, color="#D55E00", linewidth=1.5)
        axes.text(
            inside - 0.5, 1.02, f"training length {training_length:,}", transform=axes.get_xaxis_transform(),
            color="#D55E00", ha="center", va="bottom", fontsize=7.5,
        )  # fmt: skip

"""evaluation_report.md: what was evaluated, what it means, the numbers, how they were made.

The first three lines are for who reads no further. GitHub's Markdown; plots by relative path.
"""

import itertools
import os
from pathlib import Path
from urllib.parse import quote

from flare.evaluation.report.comparison_rows import ComparisonRow, fair_control
from flare.evaluation.report.figures import Plot, models_of
from flare.evaluation.report.markdown import cell, table
from flare.evaluation.report.sections import (
    context_section,
    lm_eval_section,
    passkey_section,
    recovery_section,
    samples_section,
)
from flare.evaluation.report.settings import settings_section
from flare.evaluation.report.verdict import (
    comparison_verdict,
    context_verdict,
    difference_percent,
    number,
    passkey_verdict,
    probe_warning,
    scored_datasets,
    single_verdict,
)
from flare.files import write_text
from flare.nope.layers import format_layers

SWAN_GPT = "[SWAN-GPT](https://arxiv.org/abs/2504.08719)"


def write_report(
    results: dict,
    path: Path | str,
    plots: list[Plot],
    comparison_rows: list[ComparisonRow] | None = None,
    label: str = "the model",
    training_length: int | None = None,
) -> None:
    """Write the report.

    Args:
        results: of evaluation_results.json.
        path: the Markdown file; the plots' paths in it are relative to its directory.
        comparison_rows: models or milestones to hold against each other, per data set, in order.
        label: of the evaluated model among them. training_length: longest row that it was trained on, in tokens.
    """
    path = Path(path)
    rows = comparison_rows or []
    models = models_of(results, label)
    sections = [
        _head(results, rows, label, report_verdict(results, rows, label, training_length)),
        _comparison(rows),
        context_section(results, models),
        passkey_section(models),
        recovery_section(results),
        _datasets(results),
        lm_eval_section(results),
        _plots(plots, path.parent),
        samples_section(results),
        settings_section(results),
        _notes(results, rows),
    ]
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")


def report_verdict(
    results: dict, rows: list[ComparisonRow], label: str = "the model", training_length: int | None = None
) -> str:
    """The verdict in plain words: of the comparison on the first compared data set, else of the model alone; then
    what longer contexts did.

    A model that is not what its configuration says comes before any number.
    """
    first = [row for row in rows if row.dataset == rows[0].dataset]
    models = models_of(results, label)
    parts = (
        probe_warning(results["model"]),
        comparison_verdict(first) or single_verdict(results),
        context_verdict(models, label, training_length),
        passkey_verdict(models, label, training_length),
    )
    return " ".join(part for part in parts if part)


def nope_pattern(layers: list[int]) -> str:
    """'none', 'one', 'band' (neighbours only), 'interleaved' (equal steps over 1) or 'mixed'."""
    if len(layers) < 2:
        return "one" if layers else "none"
    steps = {after - before for before, after in itertools.pairwise(layers)}
    if steps == {1}:
        return "band"
    return "interleaved" if len(steps) == 1 else "mixed"


def _head(results: dict, rows: list[ComparisonRow], label: str, verdict: str) -> str:
    """Three lines: what, verdict, the number. A backslash is Markdown's line break."""
    model, ok = results["model"], scored_datasets(results)
    kind = f"{model['model_type']}, NoPE layers: {format_layers(model['nope_layers'])}"
    what = f"# Evaluation of {_name(model['path'])} ({kind}) on {', '.join(ok) or 'nothing'}"
    line = f"**Verdict:** {verdict}\\"
    if not ok:
        return f"{what}\n{line}\n**The number:** none."
    name = rows[0].dataset if rows and rows[0].dataset in ok else next(iter(ok))
    return f"{what}\n{line}\n**The number:** {_headline(name, ok[name], rows, label)}"


def _headline(name: str, entry: dict, rows: list[ComparisonRow], label: str) -> str:
    """Perplexity, or bits per byte where another tokenizer is compared; against base and fair control if any."""
    if len({row.tokenizer_sha256 for row in rows}) > 1:
        text = f"{entry['bits_per_byte']:.4f} bits per byte on {name}"
    else:
        text = f"perplexity {number(entry['perplexity'])} on {name}"
    group = [row for row in rows if row.dataset == name]
    mine = next((row for row in group if row.label == label), None)
    base = next((row for row in group if row.role == "base"), None)
    for other in (base, fair_control(group, mine) if mine else None):
        if mine and other and other is not mine:
            text += f", {difference_percent(mine, other):+.1f} % against {other.label}"
    return text + "."


def _comparison(rows: list[ComparisonRow]) -> str:
    """A table per data set; the first row of each is what the others are held against."""
    if not rows:
        return ""
    parts = ["## Compared", _who(rows)]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        group = [row for row in rows if row.dataset == dataset]
        parts.append(f"On {cell(dataset)}:\n\n" + _comparison_table(group))
    if len({row.tokenizer_sha256 for row in rows}) > 1:
        parts.append(
            "\\* Another tokenizer than the first row's: its loss and perplexity count other tokens and "
            "may not be compared. Bits per byte may, and the difference in that row is in bits per byte."
        )
    else:
        parts.append("All rows share one tokenizer, so losses and perplexities per token may be compared.")
    if any(row.interval for row in rows):
        parts.append(
            "The last column is the 95 % bootstrap interval, over documents, of the loss minus that of the first row: "
            "where it holds zero, these documents do not tell the two apart."
        )
    return "\n\n".join(parts)


ROLES = {
    "base": "the model before anything was changed",
    "patched": "RoPE removed, nothing trained since: the damage",
    "trained": "RoPE removed, then trained (stage 1: the NoPE layers only; stage 2: everything)",
    "control": "training with RoPE kept: what the training alone does to a model",
}


def _who(rows: list[ComparisonRow]) -> str:
    """A line for each role, with the models that have it."""
    lines = []
    for role, words in ROLES.items():
        labels = dict.fromkeys(row.label for row in rows if row.role == role)
        if labels:
            lines.append(f"- {cell(', '.join(labels))}: {words}")
    return "\n".join(lines)


def _comparison_table(group: list[ComparisonRow]) -> str:
    base = group[0]
    lines = []
    for row in group:
        mark = "" if row.tokenizer_sha256 == base.tokenizer_sha256 else " \\*"
        difference = "–" if row is base else f"{difference_percent(row, base):+.1f} %{mark}"
        numbers = (f"{row.loss:.4f}{mark}", f"{number(row.perplexity)}{mark}", f"{row.bits_per_byte:.4f}")
        interval = "–" if row.interval is None else f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}{mark}"
        lines.append((row.label, *numbers, difference, interval))
    header = (
        "model", "loss (nats/token)", "perplexity", "bits/byte", f"perplexity against {base.label}",
        "loss difference, 95 %",
    )  # fmt: skip
    return table(header, lines)


def milestones_table(results: dict, dataset: str) -> str:
    """The milestones of a results file on one data set, as a plain aligned table for a terminal."""
    rows = [("model", "perplexity", "loss", "bits/byte")]
    for entry in results["milestones"]:
        scored = entry["datasets"][dataset]
        numbers = (f"{scored['loss']:.4f}", f"{scored['bits_per_byte']:.4f}")
        rows.append((entry["label"], number(scored["perplexity"]), *numbers))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _datasets(results: dict) -> str:
    header = (
        "data set", "perplexity", "loss (nats/token)", "bits/byte", "word perplexity", "byte perplexity",
        "token accuracy", "documents", "tokens", "truncated",
    )  # fmt: skip
    lines = [
        (
            name,
            number(entry["perplexity"]),
            f"{entry['loss']:.4f}",
            f"{entry['bits_per_byte']:.4f}",
            number(entry["word_perplexity"]),
            number(entry["byte_perplexity"], 4),
            f"{entry['token_accuracy']:.2f} %",
            f"{entry['num_documents']:,}",
            f"{entry['num_tokens']:,}",
            f"{entry['truncated_documents']:,}",
        )
        for name, entry in scored_datasets(results).items()
    ]
    parts = ["## Data sets"]
    if lines:
        parts.append(table(header, lines))
    failed = {name: entry for name, entry in results["datasets"].items() if entry["status"] != "ok"}
    if failed:
        items = (f"- {cell(name)}: {cell(entry['error'])}" for name, entry in failed.items())
        parts.append("Not scored:\n\n" + "\n".join(items))
    if results.get("not_compared"):
        items = (f"- {cell(name)}: {cell(error)}" for name, error in results["not_compared"].items())
        parts.append("Not compared, because another model could not be scored:\n\n" + "\n".join(items))
    if any(entry["word_perplexity"] is None for entry in scored_datasets(results).values()):
        parts.append("A dash: the text has so little white space that the number per word exceeds a float.")
    return "\n\n".join(parts)


def _plots(plots: list[Plot], directory: Path) -> str:
    if not plots:
        return ""
    parts = ["## Plots"]
    for plot in plots:
        relative = Path(os.path.relpath(plot.path, directory)).as_posix()
        parts.append(f"![{plot.path.stem.replace('_', ' ')}]({quote(relative)})\n\n{plot.sentence}")
    return "\n\n".join(parts)


def _notes(results: dict, rows: list[ComparisonRow]) -> str:
    """What is known about such models and bears on these numbers."""
    notes = [
        *_nope_notes(results["model"]["nope_layers"], bool(results.get("context_lengths"))),
        *_comparison_notes(rows),
    ]
    names = " ".join(results["datasets"]).lower()
    if "wikitext-2" in names.replace("wikitext2", "wikitext-2") and "wikitext-103" in names:
        notes.append("WikiText-2 and WikiText-103 share their test set: these are not two results.")
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _nope_notes(layers: list[int], measured: bool) -> list[str]:
    if not layers:
        return []
    ablation = (
        f"needle accuracy at 4x and 8x the training length in {SWAN_GPT}'s ablation: interleaved .998 and "
        ".957, grouped last .564 and .183, grouped first .113 and .044"
    )
    notes = [
        "Perplexity cannot tell whether these layers really ignore positions: a checkpoint opened with RoPE "
        "put back can score about the same (1.331 against 1.322 nats on a toy model). The NoPE probe in the "
        "settings can."
    ]
    if nope_pattern(layers) == "band":
        notes.append(
            "The NoPE layers are one block. A late block alone hardly extrapolates beyond the training "
            f"length ({ablation}). Good perplexity at that length says nothing about longer contexts; the interleaved "
            "layout, `--no_rope_layers every:4`, is the one that extrapolates."
        )
    if nope_pattern(layers) == "interleaved":
        notes.append(
            f"The NoPE layers are interleaved, the layout that extrapolates ({ablation}). "
            + (
                "Whether this model does, the table of context lengths says."
                if measured
                else "The perplexity here was measured up to `max_length` only and does not show it "
                "(`--context_lengths` would)."
            )
        )
    return notes


def _comparison_notes(rows: list[ComparisonRow]) -> list[str]:
    trained = [row for row in rows if row.role == "trained"]
    if not trained or all(row.role != "base" for row in rows) or fair_control(rows, trained[-1]):
        return []
    return [
        "Training on more text changes the loss by itself. The control that separates this from the removal "
        "of RoPE is the same training with RoPE kept: `--no_rope_layers none` and the same `--train_layers`."
    ]


def _name(path: str) -> str:
    """The last two parts of a model's path or hub name."""
    return "/".join(Path(path).parts[-2:])

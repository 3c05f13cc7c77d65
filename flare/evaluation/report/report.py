"""evaluation_report.md: the evaluated model, the verdict, the numbers, and the settings.

The first three lines are a summary. GitHub's Markdown; plots by relative path.
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
        comparison_rows: the compared models on each data set, in order.
        label: label of the evaluated model in these rows.
        training_length: longest training sequence of the evaluated model, in tokens.
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
    """The verdict: comparison on the first compared data set (or the model alone), context lengths, passkeys.

    A failed NoPE probe is reported first.
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
    """'none', 'one', 'band' (adjacent layers), 'interleaved' (equal steps greater than 1) or 'mixed'."""
    if len(layers) < 2:
        return "one" if layers else "none"
    steps = {after - before for before, after in itertools.pairwise(layers)}
    if steps == {1}:
        return "band"
    return "interleaved" if len(steps) == 1 else "mixed"


def _head(results: dict, rows: list[ComparisonRow], label: str, verdict: str) -> str:
    """Three lines: title, verdict, main result. A backslash is a line break in Markdown."""
    model, ok = results["model"], scored_datasets(results)
    kind = f"{model['model_type']}, NoPE layers: {format_layers(model['nope_layers'])}"
    what = f"# Evaluation of {_name(model['path'])} ({kind}) on {', '.join(ok) or 'nothing'}"
    line = f"**Verdict:** {verdict}\\"
    if not ok:
        return f"{what}\n{line}\n**Main result:** none."
    name = rows[0].dataset if rows and rows[0].dataset in ok else next(iter(ok))
    return f"{what}\n{line}\n**Main result:** {_headline(name, ok[name], rows, label)}"


def _headline(name: str, entry: dict, rows: list[ComparisonRow], label: str) -> str:
    """Perplexity (bits per byte if tokenizers differ), with the difference to the base and to a fair control."""
    if len({row.tokenizer_sha256 for row in rows}) > 1:
        text = f"{entry['bits_per_byte']:.4f} bits per byte on {name}"
    else:
        text = f"perplexity {number(entry['perplexity'])} on {name}"
    group = [row for row in rows if row.dataset == name]
    mine = next((row for row in group if row.label == label), None)
    base = next((row for row in group if row.role == "base"), None)
    for other in (base, fair_control(group, mine) if mine else None):
        if mine and other and other is not mine:
            text += f", {difference_percent(mine, other):+.1f} % vs. {other.label}"
    return text + "."


def _comparison(rows: list[ComparisonRow]) -> str:
    """A table per data set; the other rows are compared with its first row."""
    if not rows:
        return ""
    parts = ["## Comparison", _roles(rows)]
    for dataset in dict.fromkeys(row.dataset for row in rows):
        group = [row for row in rows if row.dataset == dataset]
        parts.append(f"On {cell(dataset)}:\n\n" + _comparison_table(group))
    if len({row.tokenizer_sha256 for row in rows}) > 1:
        parts.append(
            "\\* This model has a different tokenizer from the first row. Loss and perplexity per token are not "
            "comparable between tokenizers. Bits per byte are, so the differences in this row are in bits per byte."
        )
    else:
        parts.append("All models have the same tokenizer, so loss and perplexity per token are comparable.")
    if any(row.interval for row in rows):
        parts.append(
            "The last column is the 95 % confidence interval of the loss difference to the first row (bootstrap over "
            "documents). If the interval contains zero, these documents show no clear difference."
        )
    return "\n\n".join(parts)


ROLES = {
    "base": "the original model",
    "patched": "RoPE removed, no training",
    "trained": "RoPE removed, then trained (by default, stage 1 trains the NoPE layers and stage 2 trains all layers)",
    "control": "training with RoPE kept, which shows the effect of training alone",
}


def _roles(rows: list[ComparisonRow]) -> str:
    """One line for each role, with the labels of its models."""
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
        "model", "loss (nats/token)", "perplexity", "bits/byte", f"perplexity vs. {base.label}",
        "loss difference (95 % CI)",
    )  # fmt: skip
    return table(header, lines)


def milestones_table(results: dict, dataset: str) -> str:
    """The compared models on one data set, as an aligned plain-text table for a terminal."""
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
        parts.append("A dash means overflow: the text has too little white space to count words.")
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
    """Notes from the literature that help to interpret the numbers."""
    notes = [
        *_nope_notes(results["model"]["nope_layers"], bool(results.get("context_lengths"))),
        *_comparison_notes(rows),
    ]
    names = " ".join(results["datasets"]).lower()
    if "wikitext-2" in names.replace("wikitext2", "wikitext-2") and "wikitext-103" in names:
        notes.append("WikiText-2 and WikiText-103 share their test set, so these are not two independent results.")
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes) if notes else ""


def _nope_notes(layers: list[int], measured: bool) -> list[str]:
    if not layers:
        return []
    ablation = (
        f"needle retrieval accuracy at 4x and 8x the training length in the ablation of {SWAN_GPT}: interleaved "
        "0.998 and 0.957, grouped last 0.564 and 0.183, grouped first 0.113 and 0.044"
    )
    notes = [
        "Perplexity does not show whether the NoPE layers really ignore positions. A checkpoint that is loaded with "
        "RoPE in every layer can score about the same (1.331 vs. 1.322 nats on a toy model). The NoPE probe in the "
        "settings tests this directly."
    ]
    if nope_pattern(layers) == "band":
        notes.append(
            "The NoPE layers form one block. Models with one late block hardly extrapolate beyond the training length "
            f"({ablation}). Good perplexity at the training length does not imply good perplexity at longer contexts. "
            "The interleaved layout (`--no_rope_layers every:4`) extrapolates best."
        )
    if nope_pattern(layers) == "interleaved":
        notes.append(
            f"The NoPE layers are interleaved, the layout that extrapolates best ({ablation}). "
            + (
                "The table of context lengths shows whether this model extrapolates."
                if measured
                else "Perplexity was measured up to `max_length` only, so this report does not show whether this "
                "model extrapolates. Use `--context_lengths` to measure it."
            )
        )
    return notes


def _comparison_notes(rows: list[ComparisonRow]) -> list[str]:
    trained = [row for row in rows if row.role == "trained"]
    if not trained or all(row.role != "base" for row in rows) or fair_control(rows, trained[-1]):
        return []
    return [
        "Further training changes the loss by itself. To separate this effect from the removal of RoPE, train a "
        "control: the same training with RoPE kept (`--no_rope_layers none` and the same `--train_layers`)."
    ]


def _name(path: str) -> str:
    """The last two parts of a model's path or hub name."""
    return "/".join(Path(path).parts[-2:])

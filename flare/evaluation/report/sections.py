"""Sections of the report beyond perplexity: context lengths, passkey, recovery, lm-eval and samples.

Each function takes the results and returns Markdown, or '' if there is nothing to show.
"""

from flare.evaluation.report.markdown import cell, quoted, table
from flare.evaluation.report.verdict import number

CHANCE_NOTE = (
    "Guessing a seven-digit number has an accuracy of practically 0 %, so a clearly higher value shows retrieval.\n\n"
    "First choice: every token of the number has the highest probability. Written: the generated text contains it."
)


def context_section(results: dict, models: list[dict]) -> str:
    """Perplexity by context length, with one column for each model."""
    parts = []
    for name, rows in (results.get("context_lengths") or {}).items():
        columns = {m["label"]: _by_length(m["context_lengths"].get(name)) for m in models}
        columns = {label: values for label, values in columns.items() if values}
        lines = [
            (f"{row['context_length']:,}", *(number(values.get(row["context_length"])) for values in columns.values()))
            for row in rows
        ]
        tokens, documents = rows[0]["num_tokens"], rows[0]["num_documents"]
        which = f"the last {tokens // documents:,} of each of {documents:,} documents, which hold the longest context"
        parts.append(
            f"Perplexity on {cell(name)}. Every row scores the same {tokens:,} tokens ({which}):\n\n"
            + table(("context (tokens)", *columns), lines)
        )
    return "\n\n".join(["## Context length", *parts]) if parts else ""


def _by_length(rows: list[dict] | None) -> dict[int, float | None]:
    return {row["context_length"]: row["perplexity"] for row in rows or []}


def passkey_section(models: list[dict]) -> str:
    """Passkey accuracy, mean over the depths, with one row for each model and length."""
    lines = []
    for model in models:
        rows = model["passkey"]
        for length in sorted({row["context_length"] for row in rows}):
            cells = [row for row in rows if row["context_length"] == length]
            worst = min(cells, key=lambda row: row["accuracy"])
            lines.append(
                (
                    model["label"],
                    f"{length:,}",
                    f"{mean(row['accuracy'] for row in cells):.0f} %",
                    _percent([row["generated_accuracy"] for row in cells]),
                    f"{mean(row['value_loss'] for row in cells):.2f}",
                    f"{worst['accuracy']:.0f} % at {worst['depth_percent']} %",
                    sum(row["num_samples"] for row in cells),
                )
            )
    if not lines:
        return ""
    header = ("model", "context (tokens)", "first choice", "written", "loss (nats/token)", "worst depth", "texts")
    return f"## Passkey\n\n{table(header, lines)}\n\n{CHANCE_NOTE}"


def mean(values) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def _percent(values: list[float | None]) -> str:
    return "–" if None in values else f"{mean(values):.0f} %"


def recovery_section(results: dict) -> str:
    """Loss increase after removing RoPE on the held-out rows of training, and its recovery."""
    found = results.get("recovery")
    if not found:
        return ""
    rows = [
        ("base (the same weights with RoPE in every layer)", f"{found['base_loss']:.4f}"),
        ("RoPE removed, untrained", f"{found['untrained_loss']:.4f}"),
        ("loss increase", f"{found['jump']:+.4f}"),
        (f"after {found['total_tokens']:,} tokens of training", f"{found['final_loss']:.4f}"),
        ("difference to the base (negative: better)", f"{found['remaining']:+.4f}"),
    ]
    if found["won_back_percent"] is not None:
        rows.append(("recovered", f"{found['won_back_percent']:.1f} %"))
        tokens = found["tokens_to_95_percent"]
        rows.append(("tokens until 95 % was recovered", "not reached" if tokens is None else f"at most {tokens:,}"))
    return (
        "## Recovery\n\nLoss (nats per token) on the held-out documents of training, packed as in training. The first "
        f"plot shows the curve.\n\n{table(('measure', 'value'), rows)}"
    )


def lm_eval_section(results: dict) -> str:
    """Metrics of the lm-eval tasks, with the names of lm-eval."""
    found = results.get("lm_eval")
    if not found:
        return ""
    lines = []
    for task, metrics in found["tasks"].items():
        for name, value in metrics.items():
            metric, _, rule = name.partition(",")
            if metric.endswith("_stderr") or metric == "alias":
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            lines.append(
                (
                    task,
                    metric,
                    f"{value:.4f}",
                    "–" if error is None else f"{error:.4f}",
                    found["num_samples"].get(task, "–"),
                )
            )
    header = ("task", "metric", "value", "standard error", "documents")
    return f"## lm-eval {found['version']}\n\n{table(header, lines)}"


def samples_section(results: dict) -> str:
    """Generated text, collapsed."""
    rows = results.get("samples")
    if not rows:
        return ""
    rates = [(s["prompt"], f"{s['greedy_repetition']:.2f}", f"{s['sampled_repetition']:.2f}") for s in rows]
    parts = [
        "## Samples",
        "Repetition rate: share of token 4-grams that occurred earlier in the same text. A rate near 1 means that the "
        "model repeats itself. This is common for greedy text of base models, but not for sampled text (temperature "
        "0.8, top-p 0.95).",
        table(("prompt", "greedy", "sampled"), rates),
    ]
    for s in rows:
        texts = f"greedy:\n\n{quoted(s['greedy'])}\n\nsampled:\n\n{quoted(s['sampled'])}"
        summary = cell(s["prompt"]).replace(">", "&gt;")
        parts.append(f"<details><summary>{summary}</summary>\n\n{texts}\n\n</details>")
    return "\n\n".join(parts)

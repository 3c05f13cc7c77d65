"""Comparison of models on the same documents: rows of the comparison table, and differences with intervals."""

import math
from dataclasses import dataclass, replace

from flare.evaluation.models import Milestone
from flare.evaluation.report.bootstrap import Difference, paired_difference
from flare.evaluation.report.comparison_rows import ComparisonRow, comparison_row
from flare.evaluation.report.verdict import scored_datasets
from flare.evaluation.scoring.perplexity import DatasetScore

KEPT_METRICS = ("loss", "perplexity", "bits_per_byte", "token_accuracy", "lambada_accuracy", "lambada_perplexity")


@dataclass(frozen=True)
class Measured:
    """The results of one model, with its scores per document."""

    who: Milestone
    results: dict
    scores: dict[str, DatasetScore]

    @property
    def tokenizer(self) -> str:
        return self.results["model"]["tokenizer_sha256"]


def reference_of(others: list[Measured]) -> Measured:
    """The reference for ``comparison``: the first base, otherwise the first other model."""
    return next((other for other in others if other.who.role == "base"), others[0])


def comparison(model: Measured, other: Measured, seed: int) -> dict:
    """The entry ``comparison`` of evaluation_results.json: loss of ``model`` minus loss of ``other``, per data set.

    In nats per token for equal tokenizers, otherwise in bits per byte.
    """
    same = model.tokenizer == other.tokenizer
    datasets = {}
    for name in shared_datasets(model, other):
        found = difference(model.scores[name], other.scores[name], same, seed)
        datasets[name] = {
            "loss_difference": found.value,
            "ci95": found.interval and list(found.interval),
            "unit": "nats/token" if same else "bits/byte",
        }
    return {"model": other.results["model"] | {"label": other.who.label}, "datasets": datasets}


def difference(score: DatasetScore, other: DatasetScore, same_tokenizer: bool, seed: int) -> Difference:
    """Mean loss minus the mean loss of another model on the same documents, with a 95 % interval."""
    if same_tokenizer:
        sizes, other_sizes = score.document_tokens, other.document_tokens
    else:
        sizes, other_sizes = (math.log(2) * s.document_bytes for s in (score, other))
    return paired_difference(score.document_nll, sizes, other.document_nll, other_sizes, seed)


def shared_datasets(model: Measured, other: Measured) -> list[str]:
    """Data sets on which both models were scored, with the same number of documents."""
    both = (name for name in model.scores if name in other.scores)
    return [n for n in both if len(model.scores[n].document_nll) == len(other.scores[n].document_nll)]


def milestone_records(models: list[Measured]) -> list[dict]:
    """The entry ``milestones`` of evaluation_results.json: the numbers of each model, in order."""
    return [
        {
            "label": m.who.label,
            "role": m.who.role,
            "training": m.who.training,
            "path": str(m.who.directory),
            "tokenizer_sha256": m.tokenizer,
            "datasets": {
                name: {key: entry[key] for key in KEPT_METRICS if key in entry}
                for name, entry in scored_datasets(m.results).items()
            },
            "context_lengths": m.results.get("context_lengths", {}),
            "passkey": m.results.get("passkey", []),
        }
        for m in models
    ]


def comparison_rows(models: list[Measured], seed: int) -> list[ComparisonRow]:
    """Rows for each data set on which all models were scored. Intervals are relative to the first model."""
    rows = []
    for name in models[0].scores:
        if not all(name in m.scores for m in models):
            continue
        for m in models:
            interval = None
            if m is not models[0] and name in shared_datasets(m, models[0]):
                found = difference(m.scores[name], models[0].scores[name], m.tokenizer == models[0].tokenizer, seed)
                interval = found.interval
            row = comparison_row(m.who.label, m.who.role, m.results, name, interval)
            rows.append(replace(row, training=m.who.training))
    return rows

"""The verdict of an evaluation, in plain English. Pure functions of losses.

A row is one model on one data set. A row has a role: ``base`` (the original model), ``patched`` (RoPE removed, no
training), ``trained`` (in the order of training; the last one is the result) or ``control`` (trained with RoPE kept).
"""

import math

from flare.evaluation.report.comparison_rows import ComparisonRow, control_of, fair_control
from flare.evaluation.report.fair_control import differences, same_training
from flare.nope.layers import format_layers

RECOVERED = 0.95
"""Share of the loss increase that counts as recovered (95 %, as in DroPE, arXiv 2512.12167)."""

NO_JUMP_NATS = 0.005
"""A smaller loss increase is treated as none (a guess: 0.5 % of perplexity)."""

AS_GOOD_PERCENT = 1.0
"""Largest difference to the control that still counts as equally good (a guess; docs/evaluation.md)."""

CLEAR_NATS = 0.02
"""Smallest loss difference that counts beyond the training length (a guess: 2 % of perplexity)."""


def recovered_share(base_loss: float, patched_loss: float, loss: float) -> float | None:
    """``(patched - loss) / (patched - base)``: the share of the loss increase that training has recovered.

    0: no better than untrained; 1: as good as the base. None when removing RoPE did not increase the loss.
    """
    jump = patched_loss - base_loss
    return (patched_loss - loss) / jump if jump >= NO_JUMP_NATS else None


def difference_percent(row: ComparisonRow, base: ComparisonRow) -> float:
    """How much worse (positive) a row is than the base, in percent.

    In perplexity if both models have the same tokenizer, otherwise in bits per byte, because perplexity per token is
    only comparable between equal tokenizers.
    """
    if row.tokenizer_sha256 == base.tokenizer_sha256:
        return 100.0 * finite_expm1(row.loss - base.loss)
    return 100.0 * (row.bits_per_byte / base.bits_per_byte - 1.0)


def finite_expm1(exponent: float) -> float:
    """exp(x) - 1, with x limited to 700 so that it does not overflow."""
    return math.expm1(min(exponent, 700.0))


def comparison_verdict(rows: list[ComparisonRow]) -> str:
    """Verdict on one data set: the loss increase, the share that each stage recovered, and the final result.

    Uses the first row of the roles base and patched, and all trained rows. Returns '' without a base or without a
    model to compare with it. Only a control that had the same training can separate recovery from the effect of
    further training. If there is one, it decides the verdict.
    """
    base = next((row for row in rows if row.role == "base"), None)
    patched = next((row for row in rows if row.role == "patched"), None)
    trained = [row for row in rows if row.role == "trained"]
    if base is None and trained and control_of(rows, trained[-1]):
        return _control_verdict(rows).strip()
    if base is None or not (patched or trained):
        return ""
    if patched is None or patched.tokenizer_sha256 != base.tokenizer_sha256:
        return _compared((trained or [patched])[-1], base) + _control_verdict(rows)
    if not trained:
        return f"{_increase(base, patched)}. The model has not been trained since."
    shares = [recovered_share(base.loss, patched.loss, row.loss) for row in trained]
    steps = [_step(row.label, share) for row, share in zip(trained, shares, strict=True) if share is not None]
    story = "; ".join(steps)
    story = f"{_increase(base, patched)}. {story[:1].upper()}{story[1:]}." if story else f"{_increase(base, patched)}."
    result, control = trained[-1], fair_control(rows, trained[-1])
    if shares[-1] is None:
        recovered = result.loss <= base.loss + NO_JUMP_NATS
    else:
        recovered = shares[-1] >= RECOVERED
    outcome = "Not recovered"
    if recovered:
        outcome = "Recovered" if control is None else "Success" if _as_good(result, control) else "Recovered at a cost"
    return f"{outcome}: {_compared(result, base)} {story}{_control_verdict(rows)}"


def _unfair_because(control: ComparisonRow, row: ComparisonRow) -> str:
    """Why a control is not a fair comparison."""
    for r in (control, row):
        if not r.training:
            return f"the training of {r.label} is not recorded"
    return f"it had {'; '.join(differences(control.training, row.training))}"


def _as_good(row: ComparisonRow, control: ComparisonRow) -> bool:
    return difference_percent(row, control) <= AS_GOOD_PERCENT


def _control_verdict(rows: list[ComparisonRow]) -> str:
    """Comparison with the control, or that there is none, with a leading space; '' for an untrained model."""
    trained = [row for row in rows if row.role == "trained"]
    if not trained:
        return ""
    control = control_of(rows, trained[-1])
    if control is None:
        return (
            " Further training by itself also lowers the loss. Its share can only be measured with a control: the same "
            "training with RoPE kept. No control was compared."
        )
    if not same_training(control.training, trained[-1].training):
        return (
            f" The control is not a fair comparison: {_unfair_because(control, trained[-1])}. The cost of removing RoPE "
            "can only be measured with a control that had the same training."
        )
    text = f" Control (the same training with RoPE kept): {_compared(trained[-1], control)}"
    return text if _as_good(trained[-1], control) else f"{text} This difference is the cost of removing RoPE."


def _increase(base: ComparisonRow, patched: ComparisonRow) -> str:
    losses = f"from {base.loss:.3f} to {patched.loss:.3f}"
    if recovered_share(base.loss, patched.loss, patched.loss) is None:
        return f"Removing RoPE did not increase the loss ({losses})"
    return f"Removing RoPE increased the loss by {patched.loss - base.loss:.3f} nats ({losses})"


def _step(label: str, share: float) -> str:
    if share < 0:
        return f"after {label}, the loss was even higher"
    if share > 1:
        return f"after {label}, the loss was lower than that of the base"
    return f"after {label}, {100 * share:.0f} % of this increase was recovered"


def _compared(row: ComparisonRow, base: ComparisonRow) -> str:
    """'X is 1.2 % above Y in perplexity on Z (12.14 vs. 12.00).'"""
    percent = difference_percent(row, base)
    if row.tokenizer_sha256 == base.tokenizer_sha256:
        measure, values = "perplexity", (row.perplexity, base.perplexity)
    else:
        measure, values = "bits per byte", (row.bits_per_byte, base.bits_per_byte)
    side = f"{abs(percent):.1f} % {'above' if percent > 0 else 'below'}" if abs(percent) >= 0.05 else "equal to"
    digits = 2 if measure == "perplexity" else 4
    both = " vs. ".join(number(value, digits) for value in values)
    return f"{row.label} is {side} {base.label} in {measure} on {row.dataset} ({both})."


def context_verdict(models: list[dict], label: str, training_length: int | None) -> str:
    """Perplexity at the training length and at the longest context, compared with the base and the fair control.

    Returns '' when no context lengths were measured.
    """
    mine = next(m for m in models if m["label"] == label)
    name, rows = next(iter(mine["context_lengths"].items()), ("", []))
    if not rows:
        return ""
    others = [m for role in ("base", "control") if (m := _other(models, role, mine))]
    near = max((r for r in rows if r["context_length"] <= (training_length or 0)), default=rows[0], key=_length)
    far, theirs = rows[-1], _rows_at(others, name, rows[-1])
    parts = [_at_length(near, _rows_at(others, name, near))] if near is not far else []
    parts.append(_at_length(far, theirs))
    tokens = f"{far['num_tokens']:,} tokens of {far['num_documents']:,} documents"
    return f"Context length on {name} ({tokens}): {'; '.join(parts)}.{_beyond_training(far, theirs, training_length)}"


def _other(models: list[dict], role: str, mine: dict) -> dict | None:
    """The base, or the last control with the same training; None if its tokenizer differs from that of ``mine``."""
    found = [m for m in models if m["role"] == role and m is not mine]
    if role == "control":
        found = [m for m in found if same_training(m["training"], mine["training"])]
    chosen = found[0 if role == "base" else -1] if found else None
    return chosen if chosen and chosen["tokenizer_sha256"] == mine["tokenizer_sha256"] else None


def _rows_at(models: list[dict], name: str, row: dict) -> dict[str, dict]:
    """Label -> the row of that model with the context length of ``row``."""
    curves = {m["label"]: m["context_lengths"].get(name, []) for m in models}
    return {label: r for label, curve in curves.items() for r in curve if _length(r) == _length(row)}


def _beyond_training(row: dict, others: dict[str, dict], training_length: int | None) -> str:
    """Comparison at the longest context; '' if it is not longer than the training length."""
    if not others or training_length is None or _length(row) <= training_length:
        return ""
    words = [f"{_quality(row, other)} {label}" for label, other in others.items()]
    return f" Beyond the training length it is {' and '.join(words)}."


def _quality(row: dict, other: dict) -> str:
    if row["loss"] < other["loss"] - CLEAR_NATS:
        return "better than"
    return "about as good as" if row["loss"] <= other["loss"] + CLEAR_NATS else "worse than"


def _length(row: dict) -> int:
    return row["context_length"]


def _at_length(row: dict, others: dict[str, dict]) -> str:
    """'at 4,096 tokens, within 0.3 % of base', or both perplexities if they differ by 5 % or more."""
    where = f"at {row['context_length']:,} tokens"
    percents = [abs(100.0 * finite_expm1(row["loss"] - other["loss"])) for other in others.values()]
    if others and max(percents) < 5:
        return f"{where}, within {max(*percents, 0.1):.1f} % of {' and '.join(others)}"
    theirs = ", ".join(f"{label}: {number(other['perplexity'])}" for label, other in others.items())
    return f"{where}, perplexity {number(row['perplexity'])}" + (f" ({theirs})" if theirs else "")


def passkey_verdict(models: list[dict], label: str, training_length: int | None) -> str:
    """Passkey accuracy up to the training length and beyond it; '' if it was not measured."""
    mine = next(m for m in models if m["label"] == label)
    if not mine["passkey"]:
        return ""
    base = next((m for m in models if m["role"] == "base" and m is not mine and m["passkey"]), None)
    lengths = sorted({row["context_length"] for row in mine["passkey"]})
    inside = [n for n in lengths if training_length is None or n <= training_length]
    parts = []
    for words, group in (("", inside), ("beyond the training length ", [n for n in lengths if n not in inside])):
        if group:
            compared = f" (base: {_accuracy(base, group):.0f} %)" if base else ""
            parts.append(f"{words}{_accuracy(mine, group):.0f} %{compared}")
    return f"Passkey accuracy: {'; '.join(parts)}."


def _accuracy(model: dict, lengths: list[int]) -> float:
    rates = [row["accuracy"] for row in model["passkey"] if row["context_length"] in lengths]
    return sum(rates) / len(rates) if rates else 0.0


def single_verdict(results: dict) -> str:
    """The verdict on a model without a comparison: a loss by itself is neither good nor bad."""
    ok = scored_datasets(results)
    if not ok:
        return "No data set could be scored. See the errors below."
    name, first = next(iter(ok.items()))
    text = (
        f"The model predicts {first['token_accuracy']:.1f} % of the tokens of {name} correctly. Whether this is an "
        "improvement requires a second model (`--compare_to`)."
    )
    total = len(results["datasets"])
    failed = f" {total - len(ok)} of {total} data sets could not be scored." if len(ok) < total else ""
    return text + failed


def probe_warning(model: dict) -> str:
    """A warning when the probe found other NoPE layers than the configuration lists; otherwise ''."""
    probe = model["nope_probe"]
    if probe["verified"] is not False:
        return ""
    return (
        "The model does not match its configuration: its NoPE layers should be "
        f"{format_layers(model['nope_layers'])}, but the layers that ignore positions are "
        f"{format_layers(probe['layers'])}."
    )


def scored_datasets(results: dict) -> dict[str, dict]:
    """The data sets with status ok, in order."""
    return {name: entry for name, entry in results["datasets"].items() if entry["status"] == "ok"}


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table; a dash for None (overflow)."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

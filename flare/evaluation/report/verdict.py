"""What several results say together, in plain words. Pure functions of losses.

A row is one model on one data set. Rows have roles: the ``base`` as it was published, the ``patched``
model before any training, ``trained`` ones in the order of training, the last of which is the result, and ``control``
ones, which were trained with RoPE kept: a fair comparison for who had the same training.
"""

import math

from flare.evaluation.report.comparison_rows import ComparisonRow, control_of, fair_control
from flare.evaluation.report.fair_control import differences, same_training
from flare.nope.layers import format_layers

RECOVERED = 0.95
"""Share of the jump that counts as won back (DroPE, arXiv 2512.12167, and our recovery metric: 95 %)."""

NO_JUMP_NATS = 0.005
"""Below this, removing RoPE changed nothing that is worth a percentage (a guess: half a percent)."""

AS_GOOD_PERCENT = 1.0
"""How far above the control a result may lie to be called as good (a guess; docs/evaluation.md)."""

CLEAR_NATS = 0.02
"""What two losses must lie apart beyond the training length to be called different (a guess: 2 % of perplexity)."""


def won_back(base_loss: float, patched_loss: float, loss: float) -> float | None:
    """Share of the jump ``patched - base`` that is gone at ``loss``: 0 untrained, 1 as good as the base.

    None when removing RoPE did not hurt: then there is nothing to win back.
    """
    jump = patched_loss - base_loss
    return (patched_loss - loss) / jump if jump >= NO_JUMP_NATS else None


def difference_percent(row: ComparisonRow, base: ComparisonRow) -> float:
    """How much worse (positive) a row is than the base, in percent.

    Of perplexity for equal tokenizers, else of bits per byte: a token of one tokenizer is not a token of
    another, bytes are bytes.
    """
    if row.tokenizer_sha256 == base.tokenizer_sha256:
        return 100.0 * finite_expm1(row.loss - base.loss)
    return 100.0 * (row.bits_per_byte / base.bits_per_byte - 1.0)


def finite_expm1(exponent: float) -> float:
    """exp(x) - 1, at most the largest number that a table can show."""
    return math.expm1(min(exponent, 700.0))


def comparison_verdict(rows: list[ComparisonRow]) -> str:
    """What the rows of one data set say: the jump, what each training won back, where it ended.

    The first row of the roles base and patched counts, and all trained ones. '' without a base or
    without anything to hold against it. Only a control that had the same training can tell winning back from
    the effect of more training: with one, the opinion is about that.
    """
    base = next((row for row in rows if row.role == "base"), None)
    patched = next((row for row in rows if row.role == "patched"), None)
    trained = [row for row in rows if row.role == "trained"]
    if base is None and trained and control_of(rows, trained[-1]):
        return _control_verdict(rows).strip()
    if base is None or not (patched or trained):
        return ""
    if patched is None or patched.tokenizer_sha256 != base.tokenizer_sha256:
        return _against((trained or [patched])[-1], base) + _control_verdict(rows)
    if not trained:
        return f"{_jump(base, patched)}; nothing has been trained since."
    shares = [won_back(base.loss, patched.loss, row.loss) for row in trained]
    steps = [_step(row.label, share) for row, share in zip(trained, shares, strict=True) if share is not None]
    story = "; ".join([_jump(base, patched), *steps])
    result, control = trained[-1], fair_control(rows, trained[-1])
    if shares[-1] is None:
        recovered = result.loss <= base.loss + NO_JUMP_NATS
    else:
        recovered = shares[-1] >= RECOVERED
    opinion = "Not there yet"
    if recovered:
        opinion = "Won back" if control is None else "It worked" if _as_good(result, control) else "Not for free"
    return f"{opinion}: {_against(result, base)} {story}.{_control_verdict(rows)}"


def _unlike(control: ComparisonRow, row: ComparisonRow) -> str:
    """Why a control is no fair one."""
    for r in (control, row):
        if not r.training:
            return f"what {r.label} went through is not recorded beside it"
    return f"it had {'; '.join(differences(control.training, row.training))}"


def _as_good(row: ComparisonRow, control: ComparisonRow) -> bool:
    return difference_percent(row, control) <= AS_GOOD_PERCENT


def _control_verdict(rows: list[ComparisonRow]) -> str:
    """What the control says, or that there is none, behind a space; '' before any training."""
    trained = [row for row in rows if row.role == "trained"]
    if not trained:
        return ""
    control = control_of(rows, trained[-1])
    if control is None:
        return (
            " More training alone lowers the loss, too: how much of this it was, only the same training with RoPE "
            "kept can tell (the control, not compared here)."
        )
    if not same_training(control.training, trained[-1].training):
        return (
            f" The control is no fair one: {_unlike(control, trained[-1])}. What removing RoPE cost, only a control "
            "with the same training can tell."
        )
    held = f"The same training with RoPE kept is the control: {_against(trained[-1], control)}"
    return f" {held}" if _as_good(trained[-1], control) else f" {held} That is what removing RoPE costs here."


def _jump(base: ComparisonRow, patched: ComparisonRow) -> str:
    losses = f"{base.loss:.3f} to {patched.loss:.3f} nats"
    if won_back(base.loss, patched.loss, patched.loss) is None:
        return f"Removing RoPE did not hurt (loss {losses})"
    return f"Removing RoPE raised the loss by {patched.loss - base.loss:.3f} nats ({losses})"


def _step(label: str, share: float) -> str:
    if share < 0:
        return f"after {label} it was higher still"
    if share > 1:
        return f"after {label} it was below the base's"
    return f"after {label} {100 * share:.0f} % of that was won back"


def _against(row: ComparisonRow, base: ComparisonRow) -> str:
    """'X is 1.2 % above Y in perplexity on Z (12.14 against 12.00).'"""
    percent = difference_percent(row, base)
    if row.tokenizer_sha256 == base.tokenizer_sha256:
        measure, values = "perplexity", (row.perplexity, base.perplexity)
    else:
        measure, values = "bits per byte", (row.bits_per_byte, base.bits_per_byte)
    side = f"{abs(percent):.1f} % {'above' if percent > 0 else 'below'}" if abs(percent) >= 0.05 else "equal to"
    digits = 2 if measure == "perplexity" else 4
    both = " against ".join(number(value, digits) for value in values)
    return f"{row.label} is {side} {base.label} in {measure} on {row.dataset} ({both})."


def context_verdict(models: list[dict], label: str, training_length: int | None) -> str:
    """'By context length on X: within 0.3 % of base at 4,096; at 16,384 perplexity 9.1 against 410.'; '' without."""
    mine = next(m for m in models if m["label"] == label)
    name, rows = next(iter(mine["context_lengths"].items()), ("", []))
    if not rows:
        return ""
    others = [m for role in ("base", "control") if (m := _other(models, role, mine))]
    near = max((r for r in rows if r["context_length"] <= (training_length or 0)), default=rows[0], key=_length)
    far, theirs = rows[-1], _rows_at(others, name, rows[-1])
    parts = [_at_length(near, _rows_at(others, name, near))] if near is not far else []
    parts.append(_at_length(far, theirs))
    tokens = f", {far['num_tokens']:,} tokens of {far['num_documents']:,} documents"
    return f"By context length on {name}{tokens}: {'; '.join(parts)}.{_reach(far, theirs, training_length)}"


def _other(models: list[dict], role: str, mine: dict) -> dict | None:
    """The base, or the last control with the same training, if its tokens are those of ``mine``."""
    found = [m for m in models if m["role"] == role and m is not mine]
    if role == "control":
        found = [m for m in found if same_training(m["training"], mine["training"])]
    chosen = found[0 if role == "base" else -1] if found else None
    return chosen if chosen and chosen["tokenizer_sha256"] == mine["tokenizer_sha256"] else None


def _rows_at(models: list[dict], name: str, row: dict) -> dict[str, dict]:
    """Label -> what a model has at the context length of ``row``."""
    curves = {m["label"]: m["context_lengths"].get(name, []) for m in models}
    return {label: r for label, curve in curves.items() for r in curve if _length(r) == _length(row)}


def _reach(row: dict, others: dict[str, dict], training_length: int | None) -> str:
    """What the longest context says against each, where it goes beyond the training length; '' else."""
    if not others or training_length is None or _length(row) <= training_length:
        return ""
    words = [f"{_worth(row, other)} {label}" for label, other in others.items()]
    return f" Beyond the training length it is {' and '.join(words)}."


def _worth(row: dict, other: dict) -> str:
    if row["loss"] < other["loss"] - CLEAR_NATS:
        return "better than"
    return "about as good as" if row["loss"] <= other["loss"] + CLEAR_NATS else "worse than"


def _length(row: dict) -> int:
    return row["context_length"]


def _at_length(row: dict, others: dict[str, dict]) -> str:
    """'at 4,096 tokens within 0.3 % of base', or the perplexities where they lie apart."""
    where = f"at {row['context_length']:,} tokens"
    percents = [abs(100.0 * finite_expm1(row["loss"] - other["loss"])) for other in others.values()]
    if others and max(percents) < 5:
        return f"{where} within {max(*percents, 0.1):.1f} % of {' and '.join(others)}"
    against = " and ".join(f"{number(other['perplexity'])} of {label}" for label, other in others.items())
    return f"{where} perplexity {number(row['perplexity'])}" + (f" against {against}" if against else "")


def passkey_verdict(models: list[dict], label: str, training_length: int | None) -> str:
    """How often the passkey is found, up to the training length and beyond; '' where it was not asked for."""
    mine = next(m for m in models if m["label"] == label)
    if not mine["passkey"]:
        return ""
    base = next((m for m in models if m["role"] == "base" and m is not mine and m["passkey"]), None)
    lengths = sorted({row["context_length"] for row in mine["passkey"]})
    inside = [n for n in lengths if training_length is None or n <= training_length]
    parts = []
    for words, group in (("", inside), ("beyond the training length ", [n for n in lengths if n not in inside])):
        if group:
            against = f" (base {_found(base, group):.0f} %)" if base else ""
            parts.append(f"{words}{_found(mine, group):.0f} %{against}")
    return f"Passkeys found: {'; '.join(parts)}."


def _found(model: dict, lengths: list[int]) -> float:
    rates = [row["accuracy"] for row in model["passkey"] if row["context_length"] in lengths]
    return sum(rates) / len(rates) if rates else 0.0


def single_verdict(results: dict) -> str:
    """The verdict on one model that is compared with nothing: a loss alone is neither good nor bad."""
    ok = scored_datasets(results)
    if not ok:
        return "Nothing could be scored: see the errors below."
    name, first = next(iter(ok.items()))
    text = (
        f"{first['token_accuracy']:.1f} % of the tokens of {name} are the model's first choice; whether the "
        "model got better or worse needs a second one to compare with."
    )
    total = len(results["datasets"])
    failed = f" {total - len(ok)} of {total} data sets could not be scored." if len(ok) < total else ""
    return text + failed


def probe_warning(model: dict) -> str:
    """What must stand before every number when the model is not the one its configuration names; else ''."""
    probe = model["nope_probe"]
    if probe["verified"] is not False:
        return ""
    return (
        "These numbers are not those of the configured model: its NoPE layers should be "
        f"{format_layers(model['nope_layers'])}, but the layers that ignore positions are "
        f"{format_layers(probe['layers'])}."
    )


def scored_datasets(results: dict) -> dict[str, dict]:
    """The data sets with status ok, in order."""
    return {name: entry for name, entry in results["datasets"].items() if entry["status"] == "ok"}


def number(value: float | None, digits: int = 2) -> str:
    """A number as a table shows it: thousands stay readable, what overflowed is a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"

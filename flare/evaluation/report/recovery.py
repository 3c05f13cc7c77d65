"""Recovery: the share of the loss increase that training recovered, and after how many tokens. Pure functions.

The source is training_metrics.json. Before its first step, stage 1 measures the patched model and the same weights
with RoPE in every layer (the base) on the held-out rows of all later evaluations.
"""

import math
from dataclasses import asdict, dataclass

from flare.evaluation.report.verdict import NO_JUMP_NATS, RECOVERED
from flare.run.metrics_file import base_loss, trained_tokens


@dataclass(frozen=True)
class Recovery:
    """Losses in nats per token on the held-out rows of training; tokens counted over all stages."""

    base_loss: float
    untrained_loss: float
    jump: float
    final_loss: float
    remaining: float  # final minus base; below 0: better than the base
    won_back_percent: float | None  # None: removing RoPE did not increase the loss
    tokens_to_95_percent: int | None  # at the first evaluation that reached it; None: not reached, or no loss increase
    total_tokens: int
    curve: list[dict]  # {"stage", "tokens", "loss"}

    def to_json(self) -> dict:
        """The entry of evaluation_results.json."""
        return asdict(self)


def recovery_of(stages: dict[str, dict]) -> Recovery | None:
    """The recovery from the ``stages`` of a training_metrics.json; None if the loss of the base was not recorded."""
    records = (record for stage in sorted(stages) for record in stages[stage].get("history", []))
    base = base_loss(records)
    curve = held_out_curve(stages)
    if base is None or not curve or curve[0]["tokens"] != 0:
        return None
    return recovery(base, curve)


def held_out_curve(stages: dict[str, dict]) -> list[dict]:
    """``{"stage", "tokens", "loss"}`` of every evaluation during training, tokens counted over all stages."""
    curve, start = [], 0
    for stage in sorted(stages):
        for record in stages[stage].get("history", []):
            if "eval_loss" in record:
                curve.append({"stage": int(stage), "tokens": start + record["tokens"], "loss": record["eval_loss"]})
        start += trained_tokens(stages[stage])
    return curve


def control_curve(found: Recovery | None, stages: dict[str, dict]) -> list[dict]:
    """The held-out curve of the ``stages`` of a control.

    Its first loss must equal the loss of the base (relative 1e-4, because kernels round differently): then it has the
    same weights and documents. Otherwise [].
    """
    curve = held_out_curve(stages)
    if found is None or not curve or not math.isclose(curve[0]["loss"], found.base_loss, rel_tol=1e-4):
        return []
    return curve


def recovery(base: float, curve: list[dict]) -> Recovery:
    """The recovery for a curve whose first point is the untrained model."""
    untrained, final = curve[0]["loss"], curve[-1]["loss"]
    jump = untrained - base
    increased = jump >= NO_JUMP_NATS
    goal = base + (1 - RECOVERED) * jump
    return Recovery(
        base_loss=base,
        untrained_loss=untrained,
        jump=jump,
        final_loss=final,
        remaining=final - base,
        won_back_percent=100.0 * (untrained - final) / jump if increased else None,
        tokens_to_95_percent=next((p["tokens"] for p in curve if p["loss"] <= goal), None) if increased else None,
        total_tokens=curve[-1]["tokens"],
        curve=curve,
    )

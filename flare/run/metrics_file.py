"""training_metrics.json: the status of each stage. Standard library only, because the launcher has no torch."""

import time
from collections.abc import Iterable
from pathlib import Path

from flare.files import write_json
from flare.run.experiment import Experiment, stage1_sibling

SCHEMA_VERSION = 1


def record_status(experiment: Experiment, stage: int, status: str, **facts: object) -> None:
    """Write the status of a stage (running, stopped, finished, failed) if the experiment directory exists."""
    if not experiment.root.is_dir():  # removed by the user: do not create it again
        return
    content = _content(experiment)
    block = content.setdefault("stages", {}).setdefault(str(stage), {})
    if status != "failed":
        block.pop("error", None)
    block |= {"status": status, "updated": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts}
    write_json(experiment.metrics_file, content)


def enter_stage(experiment: Experiment, stage: int) -> None:
    """Record that the directory now belongs to this stage.

    Call this under the lock, after stage 1's results have been moved. Otherwise a start that fails before the move
    would make stage 1's results look like those of stage 2.
    """
    write_json(experiment.metrics_file, _content(experiment) | {"current_stage": stage})


def recorded_stages(experiment: Experiment) -> dict[str, dict]:
    """The stages ("1" and "2") of the model of this experiment, each as ``record_status`` wrote it.

    Stage 1 may be a separate experiment, NAME_stage1 next to NAME_stage2, if stage 2 recorded that it started there.
    """
    stages = experiment.read_metrics().get("stages", {})
    sibling = stage1_sibling(experiment)
    if "1" in stages or sibling is None or sibling.root.name not in Path(_starts_from(stages)).parts:
        return stages
    first = sibling.read_metrics().get("stages", {})
    return {"1": first["1"], **stages} if "1" in first else stages


def _starts_from(stages: dict[str, dict]) -> str:
    return str(stages.get("2", {}).get("starts_from", ""))


def last_throughput(experiment: Experiment, stage: int) -> tuple[int, float | None]:
    """(steps that this stage has done, tokens/s of its last logged steps or None when nothing is logged)."""
    history = experiment.read_metrics().get("stages", {}).get(str(stage), {}).get("history", [])
    rates = [record["tokens_per_sec"] for record in history if record.get("tokens_per_sec")]
    return max((record["step"] for record in history), default=0), rates[-1] if rates else None


def trained_tokens(block: dict) -> int:
    """Tokens that a stage has trained on, from its block in the file."""
    return max((record["tokens"] for record in block.get("history", [])), default=0)


def base_loss(records: Iterable[dict]) -> float | None:
    """Held-out loss of the base model, measured in the first evaluation of the first stage."""
    return next((record["rope_eval_loss"] for record in records if "rope_eval_loss" in record), None)


def _content(experiment: Experiment) -> dict:
    return experiment.read_metrics() or {"schema_version": SCHEMA_VERSION, "experiment": experiment.root.name}

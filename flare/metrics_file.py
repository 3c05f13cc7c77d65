"""training_metrics.json: how each stage stands. Standard library only, for the launcher needs it without torch."""

import time

from flare.experiment import Experiment
from flare.files import write_json

SCHEMA_VERSION = 1


def record_status(experiment: Experiment, stage: int, status: str, **facts: object) -> None:
    """Write how a stage stands (running, stopped, finished, failed) into training_metrics.json."""
    content = experiment.read_metrics() or {
        "schema_version": SCHEMA_VERSION,
        "experiment": experiment.root.name,
    }
    content["current_stage"] = stage
    block = content.setdefault("stages", {}).setdefault(str(stage), {})
    if status != "failed":
        block.pop("error", None)
    block |= {"status": status, "updated": time.strftime("%Y-%m-%d %H:%M:%S %z"), **facts}
    write_json(experiment.metrics_file, content)

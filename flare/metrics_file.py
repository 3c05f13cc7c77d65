"""training_metrics.json: how each stage stands. Standard library only, for the launcher needs it without torch."""

import json
import os
import time
from pathlib import Path

from flare.experiment import Experiment

SCHEMA_VERSION = 1


def write_json_whole(path: Path, content: object) -> None:
    """Replace a JSON file so that readers see the old or the new one, never half."""
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    os.replace(part, path)


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
    write_json_whole(experiment.metrics_file, content)

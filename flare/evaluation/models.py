"""Models of an evaluation: the role of each in its experiment, and loading them one at a time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flare.distributed.process_group import raise_first_failure, rank_from_environment
from flare.errors import ConfigError, FlareError
from flare.evaluation.options import EvaluationSettings
from flare.evaluation.report.fair_control import Training, training_of
from flare.hub import read_model_config
from flare.logs import log
from flare.nope.canary.file import CANARY_FILE, check_recorded_layers
from flare.nope.canary.measure import check_against_canary
from flare.nope.config_json import nope_layers_of
from flare.nope.load import load_causal_lm, load_tokenizer
from flare.nope.probe import input_device, probe_nope_layers
from flare.run.experiment import Experiment
from flare.run.metrics_file import recorded_stages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Milestone:
    """The role of a model in an experiment."""

    order: int
    label: str
    role: str  # base, patched, trained, control
    directory: Path
    training: Training | None = field(default_factory=dict)  # None: not recorded


def milestone(directory: Path) -> Milestone:
    """Determine the role of a model from its config.json."""
    config = read_model_config(directory)
    stage = (config.get("flare") or {}).get("stage")
    training = {} if stage is None else recorded_training(directory, stage)
    if nope_layers_of(config):
        if stage is None:
            return Milestone(1, "patched, untrained", "patched", directory)
        return Milestone(1 + stage, f"stage {stage}", "trained", directory, training)
    if training and 1 in training["stages"]:  # with RoPE in every layer, only a control has a stage 1
        return Milestone(10 + stage, f"control (stage {stage})", "control", directory, training)
    return Milestone(0, "base", "base", directory)


def recorded_training(directory: Path, last: int) -> Training | None:
    """Training of a final model up to stage ``last`` (from its config.json); None if the records of its experiment are
    not in the parent directory."""
    root = directory.resolve().parent
    if last == 1 and root.name == "stage1":  # moved there when stage 2 started
        root = root.parent
    recorded = recorded_stages(Experiment(root))
    if str(last) in recorded:
        return training_of(recorded, last)
    return {"stages": [1]} if last == 1 else None  # a stage-1 model has had no other stage


def milestones(directories: list[Path], typed: list[str] | None = None) -> list[Milestone]:
    """Milestones with unique labels: a name in parentheses is added where labels would be equal.

    Args:
        typed: the names that the user gave (for a hub model, more readable than its cache directory).
    Raises: ConfigError if the same model is given twice.
    """
    typed = typed or list(map(str, directories))
    for i, directory in enumerate(directories):
        if any(directory.resolve() == other.resolve() for other in directories[:i]):
            raise ConfigError(f"--compare_to {typed[i]}: the same model is given twice")
    found = [milestone(directory) for directory in directories]
    labels = [m.label for m in found]
    names = unique_names(typed)
    return [
        m if labels.count(m.label) == 1 else replace(m, label=f"{m.label} ({name})")
        for m, name in zip(found, names, strict=True)
    ]


def unique_names(typed: list[str]) -> list[str]:
    """For each path or hub name, the shortest suffix that no other one has. ``final_model`` at the end is left out."""
    paths = [Path(name).resolve().parts if Path(name).is_dir() else tuple(name.split("/")) for name in typed]
    paths = [path[:-1] if path[-1] == "final_model" else path for path in paths]

    def own(i: int) -> str:
        ends = ((paths[i][-n:], [p[-n:] for p in paths[:i] + paths[i + 1 :]]) for n in range(1, len(paths[i])))
        return "/".join(next((end for end, others in ends if end not in others), paths[i]))

    return [own(i) for i in range(len(paths))]


def experiment_of(model_dir: Path) -> Experiment | None:
    """The experiment that contains this final_model, or None."""
    experiment = Experiment(model_dir.resolve().parent)
    return experiment if experiment.read_metrics() else None


@contextmanager
def loaded(directory: Path, settings: EvaluationSettings, device: torch.device | None) -> Iterator[tuple]:
    """Yield (model, tokenizer, device of its inputs); freed afterwards, so that one model is in memory at a time.

    Args:
        device: None spreads the model over all GPUs and the CPU (accelerate's device_map).
    """
    check_recorded_layers(directory, nope_layers_of(read_model_config(directory)))
    check_stored_model_against_canary(directory)
    model = load_causal_lm(
        directory,
        DTYPES[settings.precision],
        settings.attn_implementation,
        device_map="auto" if device is None else None,
    )
    if device is not None:
        model.to(device)
    try:
        yield model, load_tokenizer(directory), input_device(model)
    finally:
        del model
        gc.collect()


def check_stored_model_against_canary(directory: Path) -> None:
    """Check a model against its nope_canary.json, in the stored precision because rounding changes the result.

    A collective: rank 0 checks, all ranks raise.
    Raises: FlareError if the model does not match.
    """
    failure = None
    if rank_from_environment() == 0 and (directory / CANARY_FILE).is_file():
        try:
            check_against_canary(load_causal_lm(directory), directory)
        except FlareError as error:
            failure = error
    raise_first_failure(failure)


def probe(model: torch.nn.Module) -> list[int] | None:
    """Indices of the layers that ignore positions; None for an architecture that cannot be probed."""
    try:
        return probe_nope_layers(model)
    except (AttributeError, KeyError, TypeError) as error:
        log.debug(f"no probe for {type(model).__name__}: {error}")
        return None

"""The models of an evaluation: loaded one at a time, and who they are among an experiment's milestones."""

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
    """What a model is in the story of an experiment."""

    order: int
    label: str
    role: str  # base, patched, trained, control
    directory: Path
    training: Training | None = field(default_factory=dict)  # None: not recorded beside it


def milestone(directory: Path) -> Milestone:
    """Read off its config.json what a model is."""
    config = read_model_config(directory)
    stage = (config.get("flare") or {}).get("stage")
    training = {} if stage is None else recorded_training(directory, stage)
    if nope_layers_of(config):
        if stage is None:
            return Milestone(1, "patched, untrained", "patched", directory)
        return Milestone(1 + stage, f"stage {stage}", "trained", directory, training)
    if training and 1 in training["stages"]:  # with RoPE everywhere only a control has a stage 1
        return Milestone(10 + stage, f"control (stage {stage})", "control", directory, training)
    return Milestone(0, "base", "base", directory)


def recorded_training(directory: Path, last: int) -> Training | None:
    """What a final model went through, the ``last`` stage as its config.json says; None when its experiment's records
    are not beside it."""
    root = directory.resolve().parent
    if last == 1 and root.name == "stage1":  # set aside when stage 2 began
        root = root.parent
    recorded = recorded_stages(Experiment(root))
    if str(last) in recorded:
        return training_of(recorded, last)
    return {"stages": [1]} if last == 1 else None  # there is but one way to stage 1


def milestones(directories: list[Path], typed: list[str] | None = None) -> list[Milestone]:
    """Milestones of several models, each with a label of its own: those that would share one get a name added.

    Args:
        typed: how the user named them: for a model of the hub that says more than the directory that it lies in.
    Raises: ConfigError for a model that is given twice.
    """
    typed = typed or list(map(str, directories))
    for i, directory in enumerate(directories):
        if any(directory.resolve() == other.resolve() for other in directories[:i]):
            raise ConfigError(f"--compare_to {typed[i]}: the same model is given twice")
    found = [milestone(directory) for directory in directories]
    labels = [m.label for m in found]
    names = own_names(typed)
    return [
        m if labels.count(m.label) == 1 else replace(m, label=f"{m.label} ({name})")
        for m, name in zip(found, names, strict=True)
    ]


def own_names(typed: list[str]) -> list[str]:
    """What tells models apart: of each path, or name on the hub, the shortest end that no other one has.

    All experiments' models lie in a final_model, which is left out.
    """
    paths = [Path(name).resolve().parts if Path(name).is_dir() else tuple(name.split("/")) for name in typed]
    paths = [path[:-1] if path[-1] == "final_model" else path for path in paths]

    def own(i: int) -> str:
        ends = ((paths[i][-n:], [p[-n:] for p in paths[:i] + paths[i + 1 :]]) for n in range(1, len(paths[i])))
        return "/".join(next((end for end, others in ends if end not in others), paths[i]))

    return [own(i) for i in range(len(paths))]


def experiment_of(model_dir: Path) -> Experiment | None:
    """The experiment whose final_model this is."""
    experiment = Experiment(model_dir.resolve().parent)
    return experiment if experiment.read_metrics() else None


@contextmanager
def loaded(directory: Path, settings: EvaluationSettings, device: torch.device | None) -> Iterator[tuple]:
    """(model, tokenizer, device of its inputs); freed afterwards, so that compared models never lie side by side.

    Args:
        device: None spreads the model over all GPUs and the CPU (accelerate's device_map).
    """
    check_recorded_layers(directory, nope_layers_of(read_model_config(directory)))
    hold_stored_model_to_canary(directory)
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


def hold_stored_model_to_canary(directory: Path) -> None:
    """Refuse a model that its nope_canary.json does not know. As it is stored: rounded weights are another model.

    A collective: rank 0 looks, all raise alike.
    """
    failure = None
    if rank_from_environment() == 0 and (directory / CANARY_FILE).is_file():
        try:
            check_against_canary(load_causal_lm(directory), directory)
        except FlareError as error:
            failure = error
    raise_first_failure(failure)


def probe(model: torch.nn.Module) -> list[int] | None:
    """NoPE layers found, or None for an architecture whose layers cannot be probed."""
    try:
        return probe_nope_layers(model)
    except (AttributeError, KeyError, TypeError) as error:
        log.debug(f"no probe for {type(model).__name__}: {error}")
        return None

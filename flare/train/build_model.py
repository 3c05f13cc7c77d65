"""Builds the model and the optimizer of a stage, from the model to start with or from a checkpoint."""

from pathlib import Path

import torch

from flare.checkpoint.directory import Checkpoint
from flare.checkpoint.tensor_files import TensorReader
from flare.config.options import SELECTIVE, Options
from flare.distributed.process_group import World
from flare.errors import CheckpointError
from flare.logs import log
from flare.model.compile import uncompiled
from flare.model.patches import CHECKPOINTING, apply_patches
from flare.model.training_model import TrainingModel, load_for_training, load_in_place
from flare.nope.layers import format_layers
from flare.nope.probe import verify_nope
from flare.optim.optimizer import build_optimizer, load_optimizer_tensors
from flare.run.run import Run


def build_model(run: Run, world: World, resume_from: Checkpoint | None) -> TrainingModel:
    """The model on this rank's device, with its weights and patches; its NoPE layers are verified."""
    model = _load_model(run, world, resume_from)
    layers = apply_patches(model, run.attention, run.gradient_checkpointing, run.options.compile)
    if run.gradient_checkpointing:
        selective = "selective " if run.gradient_checkpointing == SELECTIVE else ""
        log.info(f"{selective}gradient checkpointing on layers {format_layers(layers[CHECKPOINTING])}")
    _log_parameters(model)
    with uncompiled(model):
        found = verify_nope(model.causal_lm, list(run.nope_layers), decode=model.decode)
    log.info(f"NoPE layers proven from attention outputs: {format_layers(found)}")
    if run.options.compile:
        log.info("each decoder layer is compiled in the first step, which takes a while")
    return model


def build_loaded_optimizer(
    model: TrainingModel, options: Options, resume_from: Checkpoint | None
) -> torch.optim.Optimizer:
    """The optimizer of the weights that train, with the checkpoint's state.

    Raises: CheckpointError when the checkpoint has the state of some weights only.
    """
    optimizer = build_optimizer(model.trainable_parameters(), options)
    reader = TensorReader.of_state(resume_from.path, "optimizer") if resume_from else None
    if reader and reader.names():  # Adam has no state before its first update, which may come some steps later
        try:
            load_optimizer_tensors(optimizer, reader)
        except KeyError as error:
            raise CheckpointError(f"{resume_from.path.name}: optimizer state is incomplete: {error}") from error
    return optimizer


def _load_model(run: Run, world: World, resume_from: Checkpoint | None) -> TrainingModel:
    source: Path = resume_from.path if resume_from else run.init_from
    documents = run.options.packing == "document"
    settings = (run.config, run.trainable, run.precision, run.attention)
    sharded = run.parallel == "fsdp"
    if sharded:
        log.info(f"FSDP2: weights, gradients and optimizer state are divided among {world.size} processes")
    if sharded or resume_from:  # load_for_training would round a checkpoint's fp32 masters to the base's dtype
        return load_in_place(source, *settings, world, documents, sharded)
    return load_for_training(source, *settings, documents).to(world.device)


def _log_parameters(model: TrainingModel) -> None:
    counts = [0, 0]
    for parameter in model.causal_lm.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    log.info(f"parameters: {counts[1]:,} trainable, {counts[0]:,} frozen")

"""Optimizer and schedule. The schedule is a pure function of the step, so it needs no state in a checkpoint."""

from collections.abc import Callable, Iterable

import torch
from transformers import get_scheduler

from flare.options import Options
from flare.tensor_files import TensorReader


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices (and embeddings) with weight decay; norms and biases, which are vectors, without."""
    decayed: dict = {"params": [], "names": [], "weight_decay": weight_decay}
    plain: dict = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in named:
        group = decayed if parameter.ndim >= 2 else plain
        group["params"].append(parameter)
        group["names"].append(name)
    return [group for group in (decayed, plain) if group["params"]]


def build_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], options: Options) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; each group carries their ``names``."""
    return torch.optim.AdamW(
        parameter_groups(named, options.weight_decay),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=options.optim == "adamw_torch_fused",
    )


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its update obeys ``optimizer.found_inf``, a flag on the device: fused kernels do, as for GradScaler."""
    return bool(optimizer.defaults.get("fused"))


def build_schedule(options: Options, max_steps: int) -> Callable[[int], float]:
    """Factor on the learning rate at a step (0-based), by transformers' schedule of that name."""
    warmup = options.warmup_steps or int(options.warmup_ratio * max_steps)
    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.learning_rate)
    scheduler = get_scheduler(options.lr_scheduler_type, probe, num_warmup_steps=warmup, num_training_steps=max_steps)
    return scheduler.lr_lambdas[0]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state by parameter name: ``<name>|exp_avg`` and so on.

    Keyed by name, never by number: with other layers trainable, numbers would put one layer's moments
    on another of equal shape.
    """
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state[parameter].items():
                tensors[f"{name}|{key}"] = value
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, reader: TensorReader) -> None:
    """Inverse of ``optimizer_tensors``: state from files; of sharded parameters this rank's rows.

    Raises: KeyError when a parameter has no state in the files, or they hold state of another parameter: never a
        fresh Adam in silence.
    """
    left = reader.names()
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            # Fused AdamW keeps its step count on the parameter's device.
            state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
            state |= {key: torch.zeros_like(parameter, dtype=torch.float32) for key in ("exp_avg", "exp_avg_sq")}
            for key, value in state.items():
                left.remove(f"{name}|{key}")
                reader.copy_into(f"{name}|{key}", value)
            optimizer.state[parameter] = state
    if left:
        raise KeyError(f"optimizer state of unknown parameters: {sorted(left)[0]}")

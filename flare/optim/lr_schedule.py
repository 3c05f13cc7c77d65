"""The learning-rate schedule: transformers' own schedules as a pure function of the step."""

from collections.abc import Callable

import torch
from transformers import get_scheduler

from flare.config.options import Options


def build_schedule(options: Options, max_steps: int) -> Callable[[int], float]:
    """A function from a step (0-based) to the factor on the learning rate: transformers' schedule of that name."""
    warmup = options.warmup_steps or int(options.warmup_ratio * max_steps)
    placeholder = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=options.learning_rate)
    scheduler = get_scheduler(
        options.lr_scheduler_type, placeholder, num_warmup_steps=warmup, num_training_steps=max_steps
    )
    return scheduler.lr_lambdas[0]

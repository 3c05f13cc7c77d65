"""The plan of a run before anything is loaded: parameters, FLOPs, memory, disk, and whether it fits.

Pure functions of ``PlanInputs``; no torch. memory.py computes the peak of a process, suggest.py finds settings that
fit, table.py formats the plan.
"""

from dataclasses import dataclass

from flare.errors import ConfigError, EnvError
from flare.plan.capacity import GIB, Capacity, capacities, in_gib
from flare.plan.flops import TokenFlops, token_flops
from flare.plan.inputs import PlanInputs
from flare.plan.memory import Memory, memory, optimizer_state_bytes
from flare.plan.model_shape import FP32_BYTES
from flare.plan.suggest import suggest


@dataclass(frozen=True)
class Plan:
    """The numbers of a run."""

    inputs: PlanInputs
    trainable_params: int
    frozen_params: int
    tokens_per_step: int  # of an optimizer step, all processes together
    flops: TokenFlops
    memory: Memory
    capacities: tuple[Capacity, ...]  # of GPUs whose memory size is known
    checkpoint_bytes: int
    final_model_bytes: int
    disk_bytes: int  # the most during the run

    @property
    def exceeded_capacities(self) -> list[Capacity]:
        """The capacities that are smaller than the peak."""
        return [capacity for capacity in self.capacities if capacity.usable_bytes < self.memory.peak_bytes]

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits on every GPU; None when no GPU's memory size is known."""
        return not self.exceeded_capacities if self.capacities else None


def make_plan(inputs: PlanInputs) -> Plan:
    """Compute all numbers of a run. Raises nothing when the run does not fit: see ``check_fits``."""
    trainable, shape = inputs.resolved_trainable, inputs.shape
    params = trainable.params(shape)
    frozen = shape.total_params - params
    checkpoint = inputs.frozen_bytes * frozen + FP32_BYTES * params + optimizer_state_bytes(inputs)
    final_model = inputs.frozen_bytes * shape.total_params
    return Plan(
        inputs=inputs,
        trainable_params=params,
        frozen_params=frozen,
        tokens_per_step=inputs.global_batch_size * inputs.seq_len,
        flops=token_flops(
            shape, trainable, inputs.seq_len, inputs.gradient_checkpointing, inputs.attn_implementation == "eager"
        ),
        memory=memory(inputs),
        capacities=capacities(inputs),
        checkpoint_bytes=checkpoint,
        final_model_bytes=final_model,
        disk_bytes=checkpoint * checkpoints_on_disk(inputs) + final_model,
    )


def checkpoints_on_disk(inputs: PlanInputs) -> int:
    """The most checkpoints at one time: the new one is complete before the oldest is deleted."""
    if inputs.save_total_limit is None:
        return inputs.num_saves or 1
    most = inputs.save_total_limit + 1 + inputs.keeps_best
    return most if inputs.num_saves is None else min(most, inputs.num_saves)


def check_fits(plan: Plan) -> None:
    """Check, before anything is loaded, that the run fits into the memory of the known GPUs and on the disk.

    Raises:
        ConfigError: too little memory; the message has the numbers and the flag values that would fit.
        EnvError: not even one checkpoint fits on the disk.
    """
    inputs, need = plan.inputs, plan.memory
    tight = plan.exceeded_capacities
    if tight:
        capacity = min(tight, key=lambda c: c.usable_bytes)
        total, usable = in_gib(capacity.total_bytes), in_gib(capacity.usable_bytes)
        visible = [(name, size) for name, size in need.parts() if size >= 0.01 * GIB]
        parts = ", ".join(f"{name} {in_gib(size)}" for name, size in visible)
        raise ConfigError(
            f"stage {inputs.stage} of {inputs.shape.name or 'this model'} does not fit on {capacity.label}: "
            f"needs {in_gib(need.peak_bytes)} of {total} ({usable} usable) "
            f"per {'GPU' if inputs.gpus else 'process'}: {parts}; {suggest(inputs)}"
        )
    if inputs.free_disk_bytes is not None and inputs.free_disk_bytes < plan.checkpoint_bytes:
        raise EnvError(
            f"a checkpoint takes {in_gib(plan.checkpoint_bytes)}, and the output directory has "
            f"{in_gib(inputs.free_disk_bytes)} free; free some space or choose another --base_output_dir"
        )

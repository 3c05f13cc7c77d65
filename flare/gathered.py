"""What FSDP2 holds whole for a moment, on top of a rank's shards: pure functions of ``PlanInputs``; no torch.

Written down from what torch's FSDP2 allocates (profiled on the CPU, two gloo ranks; docs/memory.md). Layers take
turns, the rest (embedding, final norm, lm_head) stays from the start of the forward to the end of the backward pass.
"""

from dataclasses import dataclass

from flare.plan_inputs import PlanInputs
from flare.shapes import FP32_BYTES


@dataclass(frozen=True)
class Gathered:
    """Bytes beyond shards and activations, at each moment of a step. All zero for DDP."""

    forward: int = 0
    loss: int = 0
    backward: int = 0
    end: int = 0  # of the backward pass, when embedding and head are reduced


def gathered(inputs: PlanInputs) -> Gathered:
    """For one rank; weights are gathered in the dtype that they compute in, gradients are reduced in fp32.

    forward: a layer, the one before whose memory is not free yet, and the next, which is fetched meanwhile.
    backward: a layer and the next, its gradients, and those of the layer above as they are reduced.
    gloo, which CPU runs use, reduces a copy of its input.
    """
    if inputs.shards == 1:
        return Gathered()
    shape, trainable, unit = inputs.shape, inputs.what_trains, inputs.frozen_bytes
    rest = shape.total_params - shape.num_hidden_layers * shape.layer_params
    layer_trains = shape.attention_params if trainable.attention_only else shape.layer_params
    rest_trains = rest if trainable.everything else 0
    reduced = FP32_BYTES * (1 if inputs.gpus else 2)
    return Gathered(
        forward=unit * (rest + 3 * shape.layer_params),
        loss=unit * (rest + shape.layer_params),
        backward=unit * (rest + rest_trains + 2 * shape.layer_params + layer_trains) + reduced * layer_trains,
        end=(unit + reduced) * rest_trains,
    )

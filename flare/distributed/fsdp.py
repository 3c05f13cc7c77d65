"""FSDP2: weights, gradients and optimizer state divided among the ranks, a layer gathered when it is its turn.

One unit a decoder layer, and one for the rest: embedding, final norm and lm_head, which are needed at both ends of
a step and may be the same weight. Source: torchtitan, ``parallelize_llama``.
"""

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from flare.distributed.process_group import World


def shard_model(model: torch.nn.Module, world: "World") -> None:
    """Shard a ``TrainingModel`` over all ranks, in place; it may be on the meta device.

    On bf16 and fp16 runs units are gathered in that format and compute in it, without autocast; gradients are summed
    over ranks in fp32, into the shards of the fp32 masters. A unit may hold frozen 16-bit weights beside trainable
    fp32 ones.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if model.half_dtype:
        policy = MixedPrecisionPolicy(param_dtype=model.half_dtype, reduce_dtype=torch.float32)
    layers = model.causal_lm.get_decoder().layers
    for index, layer in enumerate(layers):
        # The last layer is needed again at once: its backward pass is the first.
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=index < len(layers) - 1)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("score", "decode"):
        _gather_for(model, method)
    if world.device.type == "cpu":
        for module in model.modules():  # gloo can add, not average
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _gather_for(model: torch.nn.Module, method: str) -> None:
    """Let a method gather the weights as forward does, and give them back.

    What is kept gathered for a backward pass would otherwise stay there without one, and ``named_parameters`` would
    give the gathered copies in place of the masters.
    """
    register_fsdp_forward_method(model, method)
    gathering = getattr(model, method)

    def gather_and_reshard(*args: object, **kwargs: object) -> object:
        try:
            return gathering(*args, **kwargs)
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    setattr(model, method, gather_and_reshard)


def materialize(model: torch.nn.Module, device: torch.device) -> None:
    """Give a model on the meta device, sharded or not, memory of its own; weights are to be filled in afterwards.

    What is no weight is computed anew: cos and sin of the rotary embedding follow from the configuration.
    """
    causal_lm = model.causal_lm
    model.to_empty(device=device)
    causal_lm.tie_weights()  # to_empty gives each module of a shared weight one of its own
    decoder = causal_lm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=causal_lm.config).to(device)


def is_sharded(tensor_or_module: object) -> bool:
    """Whether a tensor, or a module, is divided among the ranks."""
    return isinstance(tensor_or_module, (DTensor, FSDPModule))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its rows. A collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, in its own memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_row_range(tensor: DTensor) -> tuple[int, int]:
    """First row of this rank's shard, and the one after its last: chunks of equal size, the last ones shorter."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    chunk = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * chunk, rows)
    last = min(first + chunk, rows)
    assert last - first == tensor.to_local().shape[0], (tensor.shape, first, last)
    return first, last

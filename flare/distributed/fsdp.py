"""FSDP2: weights, gradients and optimizer state are sharded over the ranks; each layer is gathered for its pass.

Each decoder layer is one FSDP unit. The embedding, the final norm and lm_head form one more unit: they are needed at
both ends of a step, and embedding and lm_head may share a weight. Source: torchtitan, ``parallelize_llama``.
"""

from typing import TYPE_CHECKING

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from flare.distributed.process_group import World


def shard_model(model: torch.nn.Module, world: "World") -> None:
    """Shard a ``TrainingModel`` over all ranks, in place. The model may be on the meta device.

    On bf16 and fp16 runs, units are gathered and computed in that dtype, without autocast. Gradients are summed over
    ranks in fp32, into the shards of the fp32 master weights. A unit may mix frozen 16-bit and trainable fp32 weights.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if model.half_dtype:
        policy = MixedPrecisionPolicy(param_dtype=model.half_dtype, reduce_dtype=torch.float32)
    layers = model.causal_lm.get_decoder().layers
    for index, layer in enumerate(layers):
        # The last layer stays gathered: its backward pass follows immediately.
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=index < len(layers) - 1)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("score", "decode"):
        _register_forward_method(model, method)
    if world.device.type == "cpu":
        for module in model.modules():  # gloo can sum but not average
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _register_forward_method(model: torch.nn.Module, method: str) -> None:
    """Make a method gather the weights as ``forward`` does, and reshard them when it returns.

    Units that stay gathered for a backward pass would otherwise stay gathered when no backward pass follows, and
    ``named_parameters`` would return the gathered copies instead of the master weights.
    """
    register_fsdp_forward_method(model, method)
    gathered_method = getattr(model, method)

    def gather_and_reshard(*args: object, **kwargs: object) -> object:
        try:
            return gathered_method(*args, **kwargs)
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    setattr(model, method, gather_and_reshard)


def materialize(model: torch.nn.Module, device: torch.device) -> None:
    """Allocate memory for a model on the meta device, sharded or not. The caller fills in the weights afterwards.

    Buffers are computed here: cos and sin of the rotary embedding follow from the configuration.
    """
    causal_lm = model.causal_lm
    model.to_empty(device=device)
    causal_lm.tie_weights()  # to_empty unties shared weights
    decoder = causal_lm.get_decoder()
    decoder.rotary_emb = type(decoder.rotary_emb)(config=causal_lm.config).to(device)


def is_sharded(tensor_or_module: object) -> bool:
    """Whether a tensor or a module is sharded over the ranks."""
    return isinstance(tensor_or_module, (DTensor, FSDPModule))


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the rows of all ranks. A collective when the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, sharing its memory. A tensor that is not sharded is returned unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_row_range(tensor: DTensor) -> tuple[int, int]:
    """(first row, row after the last) of this rank's shard. Shards have equal size; the last ones may be shorter."""
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    chunk = -(-rows // mesh.size())
    first = min(mesh.get_local_rank() * chunk, rows)
    last = min(first + chunk, rows)
    assert last - first == tensor.to_local().shape[0], (tensor.shape, first, last)
    return first, last

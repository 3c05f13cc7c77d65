"""All patches of a loaded model, in one place and in one order. See torchtitan's ``parallelize_*`` functions."""

from transformers import PreTrainedModel

from flare.config.options import SELECTIVE
from flare.errors import FlareError
from flare.model.activation_checkpointing import checkpoint_layers
from flare.model.attention import KERNELS, use_kernel
from flare.model.compile import compile_layers
from flare.model.memory_efficient_layers import use_memory_efficient_layers
from flare.model.training_model import TrainingModel
from flare.nope.config_json import nope_layers_of
from flare.nope.layers import format_layers
from flare.nope.modeling_nope import NOPE_ATTENTION

NOPE, KERNEL, MEMORY, CHECKPOINTING, COMPILE = (
    "NoPE attention", "attention kernel", "memory-efficient layers", "activation checkpointing", "compile",
)  # fmt: skip


def apply_patches(
    model: TrainingModel,
    attn_implementation: str = "sdpa",
    gradient_checkpointing: bool | str = False,
    compiled: bool = False,
) -> dict[str, list[int]]:
    """Patch a model in place, whose weights are loaded and frozen or not. The order:

    1. NoPE attention. The model's class has built it in already, before any weight was loaded; here it is checked.
    2. Attention kernel: the function that every layer's attention calls.
    3. Memory-efficient layers: ``forward`` of norms and MLPs, inside the layers.
    4. Activation checkpointing: ``forward`` of each layer that has a backward pass. It runs all of the above again.
    5. Compilation of each layer, with its checkpointing in the graph.

    FSDP's sharding comes before all patches: it adds hooks around a layer's call and leaves its ``forward`` alone.

    Args:
        attn_implementation: as in ``--attn_implementation``, without ``auto``. Patches only for a key of ``KERNELS``.
        gradient_checkpointing: True, False or ``selective``.
    Returns: the layers of each patch that was applied, in this order.
    Raises: FlareError when a patch matches no layer, or the NoPE layers are not those of the configuration.
    """
    causal_lm, layers = model.causal_lm, {}
    if configured := nope_layers_of(causal_lm.config.to_dict()):
        layers[NOPE] = _check_nope_attention(causal_lm, configured)
    if attn_implementation in KERNELS:
        layers[KERNEL] = use_kernel(causal_lm, attn_implementation)
    layers[MEMORY] = use_memory_efficient_layers(causal_lm)
    if gradient_checkpointing:
        layers[CHECKPOINTING] = checkpoint_layers(causal_lm, selective=gradient_checkpointing == SELECTIVE)
    if compiled:
        layers[COMPILE] = compile_layers(model)
    for patch, matched in layers.items():
        if not matched:
            raise FlareError(f"{patch} matches no layer of this {type(causal_lm).__name__}")
    return layers


def _check_nope_attention(causal_lm: PreTrainedModel, configured: list[int]) -> list[int]:
    classes = tuple(NOPE_ATTENTION.values())
    decoder_layers = causal_lm.get_decoder().layers
    found = [index for index, layer in enumerate(decoder_layers) if isinstance(layer.self_attn, classes)]
    if found != sorted(configured):
        raise FlareError(
            f"NoPE attention is in layers {format_layers(found)}, not in layers {format_layers(sorted(configured))} "
            "as the configuration says"
        )
    return found

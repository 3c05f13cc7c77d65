"""Finds the NoPE layers of a model by running it: the layers whose attention ignores positions.

Perplexity cannot distinguish NoPE layers from RoPE layers (a NoPE checkpoint opened with RoPE may even score better).
Attention outputs can. Each attention module runs twice on the same inputs, with the position embeddings of positions p
and 3p+1; the outputs of a NoPE layer are bitwise equal. A constant shift would prove nothing, because RoPE ignores it.
"""

from collections.abc import Callable
from functools import partial

import torch

from flare.errors import CheckpointError
from flare.nope.config_json import nope_layers_of
from flare.nope.layers import format_layers

PROBE_TOKENS = 8


@torch.no_grad()
def probe_nope_layers(model: torch.nn.Module, decode: Callable | None = None) -> list[int]:
    """Indices of the decoder layers of a causal LM whose attention output does not depend on positions.

    A hook runs each attention module again inside a real forward pass, with the inputs of that pass. So the result is
    valid for the way in which this model calls its layers, works on any architecture that passes
    ``position_embeddings``, and finds the weights of a sharded model gathered.

    Args:
        decode: called instead of the decoder (the outer module of a sharded model gathers the weights).
    """
    decoder = model.get_decoder()
    device = input_device(model)
    input_ids = torch.arange(PROBE_TOKENS, device=device)[None] % decoder.embed_tokens.num_embeddings
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    found: list[int] = []

    def run_again(index: int, attention: torch.nn.Module, _args: tuple, kwargs: dict, _output: object) -> None:
        if _ignores_positions(decoder, attention, dict(kwargs)):
            found.append(index)

    hooks = [
        layer.self_attn.register_forward_hook(partial(run_again, index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    was_training = model.training
    model.eval()
    # In bf16 and fp16 runs, frozen weights are 16-bit and trainable ones fp32: matmuls of both need autocast.
    dtypes = {parameter.dtype for parameter in decoder.parameters()}
    half = torch.float16 if torch.float16 in dtypes else torch.bfloat16
    with torch.autocast(device.type, half, enabled=len(dtypes) > 1):
        try:
            (decode or decoder)(input_ids=input_ids, position_ids=positions, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
            model.train(was_training)
    return found


def input_device(model: torch.nn.Module) -> torch.device:
    """Device for a causal LM's input ids: where its embeddings run; accelerate may store them elsewhere until then."""
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return embeddings.weight.device if place is None else torch.device(place)


def _ignores_positions(decoder: torch.nn.Module, attention: torch.nn.Module, kwargs: dict) -> bool:
    hidden = kwargs["hidden_states"]
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    outputs = []
    for position_ids in (positions, 3 * positions + 1):
        kwargs["position_ids"] = position_ids
        kwargs["position_embeddings"] = decoder.rotary_emb(hidden, position_ids)
        outputs.append(attention.forward(**kwargs)[0])  # forward, not the call: no hooks
    return torch.equal(*outputs)


def verify_nope(
    model: torch.nn.Module,
    expected: list[int] | None = None,
    where: str = "the model",
    decode: Callable | None = None,
) -> list[int]:
    """Verify that exactly the NoPE layers of the configuration ignore positions.

    Args:
        model: a causal LM of transformers (wrapped models: pass the inner one).
        expected: default: the layers of ``model.config``, none for a plain model.
        decode: see ``probe_nope_layers``.
    Returns: the NoPE layers.
    Raises: CheckpointError when they differ.
    """
    if expected is None:
        expected = nope_layers_of(model.config.to_dict())
    found = probe_nope_layers(model, decode)
    if found != sorted(expected):
        raise CheckpointError(
            f"NoPE layers of {where} are not what its configuration says: "
            f"configured {format_layers(sorted(expected))}, found {format_layers(found)}"
        )
    return found

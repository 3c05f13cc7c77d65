"""The structural proof: which layers' attention ignores positions.

Perplexity cannot tell a NoPE layer from a RoPE layer (a checkpoint opened with RoPE put back may even
score better), attention outputs can. Each attention module is run twice on the same inputs, with the
position embeddings of positions p and of 3p+1; a NoPE layer gives bitwise the same output. A constant
shift would prove nothing: RoPE ignores it too.
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

    Each attention module is run again by a hook, inside a real forward pass, with its own inputs of that pass: so
    the proof covers the way in which this model calls its layers, on any architecture that passes
    ``position_embeddings``, and finds the weights of a sharded model gathered.

    Args:
        decode: how the decoder is called when not by itself (a sharded model gathers its weights at the outside).
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
    # On bf16 and fp16 runs frozen weights are 16-bit beside fp32 masters: only autocast brings them together.
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
    """Where a causal LM's input ids belong: beside its embeddings, which accelerate may keep elsewhere until used."""
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
    """Prove that exactly the layers that the configuration names are NoPE layers.

    Args:
        model: a causal LM of transformers (wrapped models: pass the inner one).
        expected: default what ``model.config`` says, none for a plain model.
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

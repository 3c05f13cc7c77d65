"""Measure a model's canary, and compare a model with one.

The numbers are those of the weights as they are saved, whatever the run computes in: each decoder layer is
brought to the saved dtype and from there to fp32 while it runs, and back. So the model in memory is enough, one
layer of it exists twice at a time, and a fresh load of the saved model gives the same numbers.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from flare.errors import CheckpointError
from flare.files import write_json
from flare.nope.canary.file import (
    CANARY_FILE,
    HOW_TO_FIX,
    LOCAL,
    NEITHER,
    ROPE_EVERYWHERE,
    TOP_K,
    Canary,
    Scores,
    Verdict,
    read_canary,
)
from flare.nope.layers import format_layers
from flare.nope.modeling_nope import NOPE_ATTENTION
from flare.nope.probe import verify_nope

LENGTH = 64
PERIODS = (LENGTH, 24, 5)
"""Tokens until a sequence repeats: random all through; a long and a short repetition, which attention heads that
look back by a distance answer differently without RoPE."""

TOP_POSITIONS = tuple(range(7, LENGTH, 8))
VOCABULARY_CHUNK = 8192
"""Rows of the lm_head that exist in fp32 at a time (160 MiB at hidden 5120)."""

Recast = Callable[[torch.Tensor], torch.Tensor]
WITH_ROPE = {nope: plain for plain, nope in NOPE_ATTENTION.items()}


def canary_sequences(config: transformers.PreTrainedConfig) -> list[list[int]]:
    """Fixed token ids of a model's vocabulary: the same for every model with as many and the same special ones.

    From the lower half, where byte-level BPE has its commonest tokens: a vocabulary ends with special tokens and
    rows that were never trained.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    special = {config.bos_token_id, config.pad_token_id, *ends}
    ordinary = [i for i in range(config.vocab_size // 2) if i not in special]
    draw = random.Random(0)
    blocks = [draw.choices(ordinary, k=period) for period in PERIODS]
    return [(block * (LENGTH // len(block) + 1))[:LENGTH] for block in blocks]


def measure_canary(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Canary | None:
    """The canary of a causal LM with NoPE layers of ours; None when it has none.

    Args:
        model: with ``nope.modeling_nope``'s attention, on any device, in any mix of dtypes; left as it was.
        dtype: in which the weights are, or will be, saved; default: as they are.
    Raises: CheckpointError when the layers are not what the configuration says, before or
        after, or are of classes that are not ours (a native export: copy its source's canary).
    """
    layers = verify_nope(model)
    if not layers:
        return None
    decoder = model.get_decoder()
    if foreign := [index for index in layers if type(decoder.layers[index].self_attn) not in WITH_ROPE]:
        raise CheckpointError(f"NoPE layers {format_layers(foreign)} are not of our classes; copy the source's canary")
    sequences = canary_sequences(model.config)
    true = score(model, sequences, list(TOP_POSITIONS), dtype)
    with rope_everywhere(model):
        rope = score(model, sequences, list(TOP_POSITIONS), dtype)
    verify_nope(model, layers)
    facts = {
        "model_type": model.config.model_type,
        "weights_dtype": str(dtype or model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "compute_dtype": "float32",
        "transformers_version": transformers.__version__,
        "torch_version": str(torch.__version__),
    }
    return Canary(sequences, list(TOP_POSITIONS), layers, true, rope, facts)


def write_canary(model: PreTrainedModel, directory: Path, dtype: torch.dtype | None = None) -> Path | None:
    """Measure a model and write nope_canary.json into its directory; nothing for a model without NoPE layers.

    Returns: the file. Args and Raises: as ``measure_canary``.
    """
    canary = measure_canary(model, dtype)
    if canary is None:
        return None
    write_json(directory / CANARY_FILE, canary.as_dict())
    return directory / CANARY_FILE


def check_canary(model: PreTrainedModel, directory: Path) -> Verdict:
    """Compare a loaded causal LM (ours, or a native export) with the canary in a directory.

    Raises: CheckpointError when the directory has no readable canary.
    """
    canary = read_canary(directory)
    if max(map(max, canary.sequences)) >= model.get_input_embeddings().num_embeddings:
        return Verdict(NEITHER, math.inf, math.inf, canary.separation_nats, 0)
    return canary.classify_nll(score(model, canary.sequences, canary.top_positions).nll, LOCAL)


def check_against_canary(model: PreTrainedModel, directory: Path) -> Verdict | None:
    """Refuse a model that is not the one of its directory's canary: layers, theta or weights that were edited.

    Args:
        model: as loaded from the directory, in the stored dtype or fp32: rounding to another one can cost more
            than the limit.
    Returns: the verdict, None without a canary.
    Raises: CheckpointError.
    """
    if not (directory / CANARY_FILE).is_file():
        return None
    verdict = check_canary(model, directory)
    if verdict.what in (ROPE_EVERYWHERE, NEITHER):
        raise CheckpointError(f"{directory} is not the model of its {CANARY_FILE}: {verdict}; {HOW_TO_FIX}")
    return verdict


@torch.no_grad()
def score(
    model: PreTrainedModel, sequences: list[list[int]], top_positions: list[int], dtype: torch.dtype | None = None
) -> Scores:
    """Per-token NLL and top log-probabilities of sequences of one length, computed in fp32.

    Raises: CheckpointError when the model gives numbers that are not finite.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    input_ids = torch.tensor(sequences, device=head.device)

    def saved(weight: torch.Tensor) -> torch.Tensor:
        return weight.to(dtype or weight.dtype).float()

    with _computing_in_fp32(model, saved):
        embedded = saved(F.embedding(input_ids, decoder.embed_tokens.weight))
        hidden = decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
        nll, top = [], []
        for rows, tokens in zip(hidden, input_ids, strict=True):
            logits = torch.cat([rows @ saved(chunk).T for chunk in head.split(VOCABULARY_CHUNK)], -1)
            logprobs = logits.log_softmax(-1)
            nll.append(_rounded(-logprobs[:-1].gather(1, tokens[1:, None])[:, 0]))
            values, ids = logprobs[top_positions].topk(TOP_K)
            top.append([{"ids": i.tolist(), "logprobs": _rounded(v)} for i, v in zip(ids, values, strict=True)])
    scores = Scores(nll, top)
    if not all(map(math.isfinite, scores.flat_nll() + scores.flat_top())):
        raise CheckpointError("the model's log-probabilities are not finite numbers: its weights are damaged")
    return scores


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


@contextlib.contextmanager
def rope_everywhere(model: PreTrainedModel) -> Iterator[None]:
    """Put RoPE back into the NoPE layers of this instance for a while. Weights and hooks stay."""
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    classes = [type(attention) for attention in attentions]
    try:
        for attention, own in zip(attentions, classes, strict=True):
            attention.__class__ = WITH_ROPE.get(own, own)
        yield
    finally:
        for attention, own in zip(attentions, classes, strict=True):
            attention.__class__ = own


@contextlib.contextmanager
def _computing_in_fp32(model: PreTrainedModel, saved: Recast) -> Iterator[None]:
    """Evaluation in true fp32 with torch's own attention, layer by layer; the model comes out as it was.

    ``saved`` turns a weight into the fp32 numbers that its file holds. Attention kernels for bf16 only cannot be
    used here, hence sdpa.
    """
    decoder = model.get_decoder()
    configs = {id(module.config): module.config for module in (decoder, *(la.self_attn for la in decoder.layers))}
    attention = {key: config._attn_implementation for key, config in configs.items()}
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    device = decoder.embed_tokens.weight.device.type
    with _swapped_weights((*decoder.layers, decoder.norm), saved), torch.autocast(device, enabled=False):
        try:
            model.eval()
            torch.set_float32_matmul_precision("highest")
            for config in configs.values():
                config._attn_implementation = "sdpa"
            yield
        finally:
            for key, config in configs.items():
                config._attn_implementation = attention[key]
            torch.set_float32_matmul_precision(precision)
            model.train(was_training)


@contextlib.contextmanager
def _swapped_weights(modules: tuple[torch.nn.Module, ...], saved: Recast) -> Iterator[None]:
    """While one of the modules runs, its weights are ``saved(weight)``; afterwards the same tensors as before."""
    own: dict[torch.nn.Parameter, torch.Tensor] = {}

    def swap_in(module: torch.nn.Module, _args: tuple) -> None:
        for parameter in module.parameters():
            own[parameter] = parameter.data
            parameter.data = saved(parameter.data)

    def swap_out(*_: object) -> None:
        for parameter, data in own.items():
            parameter.data = data
        own.clear()

    hooks = [module.register_forward_pre_hook(swap_in) for module in modules]
    hooks += [module.register_forward_hook(swap_out) for module in modules]
    try:
        yield
    finally:
        swap_out()
        for hook in hooks:
            hook.remove()

"""modeling_nope.py computes the same numbers with every cache, kernel, packing, padding and compilation.

Tolerance of what may differ by rounding: 1e-4 on fp32 logits of size 7. Measured on the CPU: up to 2.4e-5.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from flare.nope.load import load_causal_lm
from flare.nope.probe import probe_nope_layers
from tests.nope.patched_models import (
    CACHES,
    LENGTHS,
    POSITIONS,
    Patched,
    assert_same,
    check_left_padding,
    check_packing,
    generate,
    left_padded,
    logits,
    tokens,
)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_steps_give_the_logits_of_the_whole_sequence(patched: Patched, cache: str, attention: str) -> None:
    model, input_ids = patched.load(attention), tokens()
    past = CACHES[cache](model.config)
    steps = [input_ids[:, :16], *input_ids[:, 16:].split(1, dim=1)]
    with torch.no_grad():
        cached = torch.cat([model(step, past_key_values=past).logits for step in steps], 1)
    assert_same(cached, logits(model, input_ids))


@pytest.mark.parametrize("cache", CACHES)
def test_generation_is_greedy_decoding_without_a_cache(model: PreTrainedModel, cache: str) -> None:
    expected = tokens(length=8)
    for _ in range(12):
        expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
    generated = generate(model, tokens(length=8), cache_implementation=cache)
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_rows_give_the_logits_of_unpadded_ones(patched: Patched, attention: str) -> None:
    model = patched.load(attention)
    check_left_padding(model, model)


def test_left_padded_rows_generate_what_they_do_alone(model: PreTrainedModel) -> None:
    rows = tokens(batch=3)
    input_ids, mask = left_padded(rows)
    together = generate(model, input_ids, attention_mask=mask)
    for index, length in enumerate(LENGTHS):
        alone = generate(model, rows[index : index + 1, :length])
        assert together[index, max(LENGTHS) :].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_give_the_logits_of_separate_ones(patched: Patched, attention: str) -> None:
    model = patched.load(attention)
    check_packing(model, model)


def test_eager_gives_the_logits_of_sdpa(patched: Patched) -> None:
    assert_same(logits(patched.load("eager"), tokens()), logits(patched.load("sdpa"), tokens()))


@pytest.mark.slow  # the kernel is compiled for every new shape
def test_flex_attention_gives_the_logits_of_sdpa(patched: Patched) -> None:
    torch._dynamo.reset()
    flex, sdpa = patched.load("flex_attention"), patched.load("sdpa")
    assert_same(logits(flex, tokens()), logits(sdpa, tokens()))
    check_left_padding(flex, sdpa)
    check_packing(flex, sdpa)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_kernels_on_the_gpu_are_as_near_to_fp32_as_sdpa(patched: Patched, attention: str) -> None:
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    row = tokens(batch=1).cuda()
    for position_ids in (None, POSITIONS.cuda()):
        exact = logits(patched.load().cuda(), row, position_ids=position_ids)
        error = {
            name: (logits(patched.load(name, dtype=torch.bfloat16).cuda(), row, position_ids=position_ids) - exact)
            for name in ("sdpa", attention)
        }
        assert error[attention].abs().mean() <= 2 * error["sdpa"].abs().mean()


def test_dropout_reaches_the_nope_layers(patched: Patched) -> None:
    model = patched.load("eager").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = float(layer.self_attn.layer_idx in patched.nope_layers)
    hidden = []
    index = patched.nope_layers[0]
    hook = model.model.layers[index].self_attn.o_proj.register_forward_pre_hook(
        lambda _m, args: hidden.append(args[0])
    )
    logits(model, tokens())
    hook.remove()
    assert not hidden[0].any()


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(model: PreTrainedModel) -> None:
    expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    found = gradients(model)
    assert len(runs) == 2  # forward, and again in the backward pass
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_graph_break_in_any_layer(model: PreTrainedModel) -> None:
    """Per-block compilation with fullgraph is how the training may be compiled; dynamo alone finds breaks."""
    expected = logits(model, tokens())
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert_same(logits(model, tokens()), expected)


@pytest.mark.slow  # inductor's C++ kernels: 5 to 12 s
@pytest.mark.parametrize("compiled", [torch.compile, lambda m: torch.compile(m, fullgraph=True)])
def test_compiled_model_gives_the_same_logits(model: PreTrainedModel, compiled: Callable) -> None:
    torch._dynamo.reset()
    assert_same(logits(compiled(model), tokens()), logits(model, tokens()))


@pytest.mark.slow
def test_compiled_training_gives_the_same_gradients(model: PreTrainedModel) -> None:
    expected = gradients(model)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    found = gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def test_save_pretrained_keeps_layers_and_logits(patched: Patched, tmp_path: Path) -> None:
    model = patched.load()
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path)
    assert probe_nope_layers(again) == patched.nope_layers
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))

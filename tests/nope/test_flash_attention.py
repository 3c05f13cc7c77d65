"""Flash attention up to the kernel: transformers' own code over a replacement of flash-attn."""

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from flare.nope.probe import probe_nope_layers
from tests.nope import fake_flash_attn
from tests.nope.patched_models import (
    CACHES,
    DEPTH,
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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> fake_flash_attn.FakeFlashAttn:
    return fake_flash_attn.install(monkeypatch)


def test_every_layer_gives_flash_attention_the_bounds_of_its_sequences(
    patched: Patched, model: PreTrainedModel, kernels: fake_flash_attn.FakeFlashAttn
) -> None:
    flash = patched.load("flash_attention_2")
    assert_same(logits(flash, tokens()), logits(model, tokens()))
    assert kernels.bounds[-DEPTH:] == [None] * DEPTH
    input_ids, mask = left_padded(tokens(batch=3))
    logits(flash, input_ids, attention_mask=mask)
    assert kernels.bounds[-DEPTH:] == [[0, 9, 29, 43]] * DEPTH
    logits(flash, tokens(batch=1), position_ids=POSITIONS)
    assert kernels.bounds[-DEPTH:] == [[0, 17, 30, 40]] * DEPTH
    check_left_padding(flash, model)
    check_packing(flash, model)


def test_flash_attention_ignores_positions_in_nope_layers(
    patched: Patched, kernels: fake_flash_attn.FakeFlashAttn
) -> None:
    assert probe_nope_layers(patched.load("flash_attention_2")) == patched.nope_layers
    assert len(kernels.bounds) > 2 * DEPTH  # in loading, and here


@pytest.mark.parametrize("cache", CACHES)
def test_flash_attention_generates_what_sdpa_does(
    patched: Patched, model: PreTrainedModel, kernels: fake_flash_attn.FakeFlashAttn, cache: str
) -> None:
    flash = patched.load("flash_attention_2")
    kernels.bounds.clear()
    input_ids, mask = left_padded(tokens(batch=3))
    generated = generate(flash, input_ids, attention_mask=mask, cache_implementation=cache)
    assert kernels.bounds == [[0, 9, 29, 43]] * DEPTH + [[0, 1, 2, 3]] * 11 * DEPTH  # the cache serves 11 of 12 tokens
    assert generated.tolist() == generate(model, input_ids, attention_mask=mask).tolist()


def test_cached_steps_of_flash_attention_give_the_logits_of_the_whole_sequence(
    patched: Patched, model: PreTrainedModel, kernels: fake_flash_attn.FakeFlashAttn
) -> None:
    """Steps of one and of several tokens, without padding and with it."""
    flash, rows = patched.load("flash_attention_2"), tokens(batch=3)
    for input_ids, mask in ((rows, None), left_padded(rows)):
        past = DynamicCache(config=flash.config)
        cached, seen = [], 0
        for step in input_ids.split([12, 1, 5, input_ids.shape[1] - 18], 1):
            seen += step.shape[1]
            extra = {} if mask is None else {"attention_mask": mask[:, :seen]}
            with torch.no_grad():
                cached.append(flash(step, past_key_values=past, **extra).logits)
        expected = logits(model, input_ids, attention_mask=mask)
        real = slice(None) if mask is None else mask.bool()
        assert_same(torch.cat(cached, 1)[real], expected[real])


def test_flash_attention_gets_half_precision_under_autocast(
    patched: Patched, kernels: fake_flash_attn.FakeFlashAttn
) -> None:
    """It takes nothing else; Qwen3's norms and RoPE make fp32 of queries and keys, the values stay bf16."""
    flash = patched.load("flash_attention_2")
    kernels.dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        logits(flash, tokens())
    assert kernels.dtypes == {torch.bfloat16}

"""The modelling file gives the same numbers however it is run: caches, kernels, packing, padding, compilation.

Tolerance of what may differ by rounding: 1e-4 on fp32 logits of size 7. Measured on the CPU: up to 2.4e-5.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_checkpoint
from flare.nope.probe import probe_nope_layers
from tests.conftest import write_base
from tests.nope import fake_flash_attn

DEPTH = 4
SHAPES = {
    "qwen2": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2-odd-heads": ("qwen2", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),  # head_dim 16 of hidden 32 and 4 heads
}


@dataclass
class Patched:
    directory: Path
    nope_layers: list[int]

    def load(self, attention: str = "sdpa", **kwargs: object) -> PreTrainedModel:
        return load_causal_lm(self.directory, attn_implementation=attention, **kwargs)


@pytest.fixture(scope="module", params=SHAPES)
def patched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Patched:
    """A random model that looks at positions, with a random set of NoPE layers."""
    family, shape = SHAPES[request.param]
    root = tmp_path_factory.mktemp("attention")
    write_base(root / "base", family, initializer_range=0.1, **shape)
    draw = random.Random(request.param)
    layers = sorted(draw.sample(range(DEPTH), draw.randint(1, DEPTH - 1)))
    patch_checkpoint(root / "base", root / "patched", layers)
    return Patched(root / "patched", layers)


@pytest.fixture
def model(patched: Patched) -> PreTrainedModel:
    return patched.load()


def tokens(batch: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 300, (batch, length), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids, use_cache=False, **kwargs).logits


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# -- generation ------------------------------------------------------------------------------------------------------


CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=48),
}


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


def generate(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    ends = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(input_ids, do_sample=False, **ends, **kwargs)


# -- batches ---------------------------------------------------------------------------------------------------------


LENGTHS = (9, 20, 14)


def left_padded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut to ``LENGTHS``, padded on the left, and their mask."""
    width = max(LENGTHS)
    input_ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width).long()
    for index, length in enumerate(LENGTHS):
        input_ids[index, width - length :], mask[index, width - length :] = rows[index, :length], 1
    return input_ids, mask


def check_left_padding(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Padded rows under the model are the unpadded ones under the reference."""
    rows = tokens(batch=3)
    input_ids, mask = left_padded(rows)
    padded = logits(model, input_ids, attention_mask=mask)
    for index, length in enumerate(LENGTHS):
        assert_same(padded[index, -length:], logits(reference, rows[index : index + 1, :length])[0])


DOCUMENTS = (17, 13, 10)
POSITIONS = torch.cat([torch.arange(length) for length in DOCUMENTS])[None]


def check_packing(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """A packed row under the model is its documents alone under the reference."""
    row = tokens(batch=1)
    apart = torch.cat([logits(reference, document) for document in row.split(DOCUMENTS, 1)], 1)
    assert_same(logits(model, row, position_ids=POSITIONS), apart)
    assert (logits(model, row) - apart).abs().max() > 0.1  # as one document it is another text


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


# -- kernels ---------------------------------------------------------------------------------------------------------


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


# -- flash-attention, up to the kernel: transformers' own code over a stand-in for flash-attn -------------------------


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


# -- training --------------------------------------------------------------------------------------------------------


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


# -- what is saved ---------------------------------------------------------------------------------------------------


def test_save_pretrained_keeps_layers_and_logits(patched: Patched, tmp_path: Path) -> None:
    model = patched.load()
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path)
    assert probe_nope_layers(again) == patched.nope_layers
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))

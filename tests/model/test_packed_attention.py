"""Document boundaries as masks and as bounds: compared with transformers' own mask, and with each other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.masking_utils import create_causal_mask

from flare.errors import ConfigError
from flare.model import attention
from flare.model.attention import TOKENS_PER_DOCUMENT, document_bounds, document_mask, use_kernel
from flare.model.compile import compile_layers
from flare.plan.trainable import Trainable
from flare.run.run import choose_attention
from tests.train.test_training import load


def random_positions(rng: np.random.Generator, rows: int, length: int, mean: int) -> np.ndarray:
    """Position ids that restart at random, as ``PackedRows`` makes them."""
    starts = rng.random((rows, length)) < 1 / mean
    starts[:, 0] = True
    index = np.tile(np.arange(length), (rows, 1))
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


@pytest.mark.parametrize("seed", range(5))
def test_mask_is_transformers_own(base: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = torch.from_numpy(random_positions(rng, 3, 40, mean=2 + 4 * seed))
    config = load(base, [1], Trainable(True)).causal_lm.config
    theirs = create_causal_mask(
        config=config, inputs_embeds=torch.zeros(3, 40, 8), attention_mask=None, past_key_values=None,
        position_ids=positions,
    )  # fmt: skip
    assert torch.equal(document_mask(positions), theirs)


@pytest.mark.parametrize("seed", range(5))
def test_bounds_agree_with_the_mask(seed: int) -> None:
    """A query attends to exactly the keys between its own two bounds that are not after it."""
    rng = np.random.default_rng(seed)
    positions = random_positions(rng, 3, 64, mean=2 + 6 * seed)
    bounds = document_bounds(positions)
    assert bounds.dtype == np.int32
    assert bounds[0] == 0
    assert bounds[-1] == positions.size
    assert (np.diff(bounds) >= 0).all()
    documents = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    seen = (documents[:, None] == documents[None]) & np.tri(positions.size, dtype=bool)
    mask = document_mask(torch.from_numpy(positions)).numpy()[:, 0]
    for row in range(3):
        block = slice(64 * row, 64 * row + 64)
        assert np.array_equal(seen[block, block], mask[row])
        assert seen[block].sum() == mask[row].sum()  # and no key of other rows


def test_shape_of_bounds_stays_unless_documents_are_very_short() -> None:
    shapes = {document_bounds(random_positions(np.random.default_rng(s), 4, 2048, 600)).shape for s in range(20)}
    assert shapes == {(4 * 2048 // TOKENS_PER_DOCUMENT + 1,)}
    shortest = document_bounds(np.zeros((2, 64), dtype=np.int64))  # every token a document
    assert np.array_equal(np.unique(shortest), np.arange(129))
    assert document_bounds(np.arange(8)[None]).tolist() == [0, 8]
    assert document_bounds(np.arange(3, 11)[None]).tolist() == [0, 8]  # a row that begins inside a document


def by_documents(query, key, value, bounds, longest, scale):
    """What the kernels compute, in plain torch: causal attention between bounds, (B*T, heads, D)."""
    assert all(x.dtype == value.dtype for x in (query, key))
    assert int(bounds.diff().max()) <= longest
    outputs = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if first == last:
            continue
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("implementation", ["varlen", "flash_attention_2"])
@pytest.mark.parametrize("family", ["base", "base_qwen3"])
def test_a_kernel_gets_arguments_that_equal_the_mask(
    implementation: str, family: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The kernel itself needs a GPU and is replaced by a loop over documents. Loss and gradients, fp32, 1e-5."""
    monkeypatch.setattr(attention, "_torch_varlen", by_documents)
    monkeypatch.setattr(attention, "_flash_attn_varlen", by_documents)
    rng = np.random.default_rng(0)
    positions = random_positions(rng, 2, 96, mean=20)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 96)))
    results = []
    for bounds in (None, torch.from_numpy(document_bounds(positions))):
        model = load(request.getfixturevalue(family), [1, 3], Trainable(True)).train()
        use_kernel(model.causal_lm, implementation)
        loss = model(ids, ids.roll(-1, 1), torch.from_numpy(positions), bounds)
        loss.backward()
        results.append((loss.item(), [p.grad for _, p in model.trainable_parameters()]))
    (masked, expected), (packed, found) = results
    assert packed == pytest.approx(masked, rel=1e-5)
    floor = 1e-3 * torch.stack([g.norm() for g in expected]).norm()
    for a, b in zip(expected, found, strict=True):
        assert (a - b).norm() / max(a.norm(), floor) < 1e-5


def test_torchs_kernel_is_called_from_inside_a_compiled_layer(base: Path) -> None:
    """As far as a CPU can show: a layer is one graph with the kernel in it, and only the kernel itself is missing."""
    model = load(base, [1, 3], Trainable(True), precision="bf16").train()
    use_kernel(model.causal_lm, "varlen")
    kernels: list[int] = []

    def look(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        kernels.append(sum("_varlen_attn" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    compile_layers(model, look)
    positions = np.tile(np.arange(32), (2, 1))
    ids = torch.zeros(2, 32, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"_flash_attention_forward.*'CPU' backend"):
        model(ids, ids, torch.from_numpy(positions), torch.from_numpy(document_bounds(positions)))
    assert kernels == [1]


@pytest.mark.gpu
def test_varlen_kernel_equals_the_mask_on_a_gpu(base: Path) -> None:
    """bf16: the mean loss within 1e-2 of SDPA with a mask on the same weights, the gradient within 5 %."""
    rng = np.random.default_rng(0)
    positions = random_positions(rng, 2, 256, mean=40)
    ids = torch.from_numpy(rng.integers(0, 300, (2, 256))).cuda()
    results = []
    for bounds in (None, torch.from_numpy(document_bounds(positions)).cuda()):
        model = load(base, [1, 3], Trainable(True), precision="bf16").cuda().train()
        if bounds is not None:
            use_kernel(model.causal_lm, "varlen")
        loss = model(ids, ids.roll(-1, 1), torch.from_numpy(positions).cuda(), bounds)
        loss.backward()
        results.append(
            (loss.item() / ids.numel(), torch.cat([p.grad.flatten() for _, p in model.trainable_parameters()]))
        )
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-2)
    assert (results[0][1] - results[1][1]).norm() < 0.05 * results[0][1].norm()


def test_auto_is_the_flash_kernel_on_gpus_in_bf16() -> None:
    assert choose_attention("auto", use_cuda=True, precision="bf16") == "varlen"
    assert choose_attention("auto", use_cuda=True, precision="fp32") == "sdpa"
    assert choose_attention("auto", use_cuda=False, precision="bf16") == "sdpa"
    assert choose_attention("eager", use_cuda=True, precision="bf16") == "eager"
    with pytest.raises(ConfigError, match="--attn_implementation varlen runs on GPUs in bf16 only"):
        choose_attention("varlen", use_cuda=False, precision="bf16")


def test_missing_flash_attn_is_one_error_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the flash-attn package, which is not installed"):
        choose_attention("flash_attention_2", use_cuda=True, precision="bf16")

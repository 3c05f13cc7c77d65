"""The patches of a model: their order, and that each one matches every layer that it is meant for."""

from pathlib import Path

import pytest
import torch

from flare.config.options import SELECTIVE
from flare.errors import FlareError
from flare.hub import read_model_config
from flare.model import activation_checkpointing, attention, memory_efficient_layers, patches
from flare.model.compile import compile_layers
from flare.model.patches import CHECKPOINTING, COMPILE, KERNEL, MEMORY, NOPE, apply_patches
from flare.model.training_model import TrainingModel, load_for_training
from flare.nope.config_json import with_nope
from flare.nope.modeling_nope import NOPE_ATTENTION
from flare.plan.trainable import Trainable

ALL_LAYERS, NOPE_LAYERS = [0, 1, 2, 3], [1, 3]
ALL_PATCHES = {"attn_implementation": "varlen", "gradient_checkpointing": SELECTIVE, "compiled": True}


def load(directory: Path, trainable: Trainable, nope_layers: list[int] = NOPE_LAYERS) -> TrainingModel:
    config = with_nope(read_model_config(directory), nope_layers, None, "test")
    return load_for_training(directory, config, trainable, "fp32", "auto")


def forward(model: TrainingModel) -> None:
    ids = torch.arange(16).repeat(2, 1)
    model(ids, ids, ids)


def test_patches_are_applied_in_the_documented_order(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def record(name: str) -> None:
        function = getattr(patches, name)
        monkeypatch.setattr(patches, name, lambda *args, **kwargs: order.append(name) or function(*args, **kwargs))

    functions = ["_check_nope_attention", "use_kernel", "use_memory_efficient_layers", "checkpoint_layers"]
    for name in (*functions, "compile_layers"):
        record(name)
    layers = apply_patches(load(base, Trainable(True)), **ALL_PATCHES)
    assert order == [*functions, "compile_layers"]
    assert list(layers) == [NOPE, KERNEL, MEMORY, CHECKPOINTING, COMPILE]


@pytest.mark.parametrize("family", ["base", "base_qwen3"])
def test_each_attention_norm_and_mlp_is_patched(
    family: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass; every patched function notes the module that it ran for."""
    ran: list[torch.nn.Module] = []

    def note_module(owner: object, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda module, *a, **k: ran.append(module) or function(module, *a, **k))

    note_module(attention, "_varlen")
    note_module(memory_efficient_layers, "_rms_norm")
    note_module(memory_efficient_layers, "_swiglu_mlp")
    model = load(request.getfixturevalue(family), Trainable(True))
    layers = apply_patches(model, "varlen")
    assert layers == {NOPE: NOPE_LAYERS, KERNEL: ALL_LAYERS, MEMORY: ALL_LAYERS}
    forward(model)
    kinds = ("RMSNorm", "MLP", "Attention")
    meant = [m for m in model.modules() if any(type(m).__name__.endswith(kind) for kind in kinds)]
    assert len(meant) == {"base": 4 * 4 + 1, "base_qwen3": 4 * 6 + 1}[family]
    assert set(map(id, ran)) == set(map(id, meant))
    assert len(ran) == len(meant)


def test_nope_attention_is_in_the_configured_layers_only(base: Path) -> None:
    model = load(base, Trainable(True))
    decoder_layers = model.causal_lm.get_decoder().layers
    classes = tuple(NOPE_ATTENTION.values())
    assert [i for i, layer in enumerate(decoder_layers) if isinstance(layer.self_attn, classes)] == NOPE_LAYERS
    assert NOPE not in apply_patches(load(base, Trainable(True), []))
    attention_class = next(base for base, nope in NOPE_ATTENTION.items() if type(decoder_layers[3].self_attn) is nope)
    decoder_layers[3].self_attn.__class__ = attention_class  # RoPE is back
    with pytest.raises(FlareError, match="NoPE attention is in layers 1, not in layers 1 3"):
        apply_patches(model)


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [(Trainable(True), ALL_LAYERS), (Trainable(False, (1, 3)), [1, 2, 3]), (Trainable(False, (3,), True), [3])],
)
def test_each_layer_with_a_backward_pass_is_checkpointed(
    base: Path, trainable: Trainable, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[torch.nn.Module] = []
    checkpoint = activation_checkpointing.checkpoint

    def note_layer(run: object, *args: object, **kwargs: object) -> object:
        ran.append(run.func.__self__)
        return checkpoint(run, *args, **kwargs)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", note_layer)
    model = load(base, trainable).train()
    assert apply_patches(model, gradient_checkpointing=True)[CHECKPOINTING] == expected
    forward(model)
    assert ran == [model.causal_lm.get_decoder().layers[index] for index in expected]


def test_each_layer_is_compiled_with_its_checkpointing_in_the_graph(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(patches, "compile_layers", lambda model: compile_layers(model, backend))
    model = load(base, Trainable(True)).train()
    assert apply_patches(model, **ALL_PATCHES)[COMPILE] == ALL_LAYERS
    assert all(layer._compiled_call_impl is not None for layer in model.causal_lm.get_decoder().layers)
    forward(model)
    assert len(graphs) == 2  # RoPE and NoPE
    assert all("checkpoint" in graph for graph in graphs)


def test_a_patch_that_matches_no_layer_is_an_error(base: Path) -> None:
    model = load(base, Trainable(True))
    model.causal_lm.requires_grad_(False)
    with pytest.raises(FlareError, match="activation checkpointing matches no layer of this Qwen2NopeForCausalLM"):
        apply_patches(model, gradient_checkpointing=True)

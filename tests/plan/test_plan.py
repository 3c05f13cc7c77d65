"""The plan's numbers, held to hand-worked ones, to transformers' models and to what torch allocates."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.allocated import allocated_peak
from flare.checkpoint.directory import model_tensors
from flare.config.options import SELECTIVE
from flare.cpu import read_available_ram
from flare.errors import ConfigError, EnvError
from flare.model import activation_checkpointing, linear_cross_entropy
from flare.model.patches import apply_patches
from flare.model.training_model import TrainingModel, set_trainable
from flare.nope.layers import auto_band
from flare.nope.modeling_nope import remove_rope
from flare.nope.weight_files import save_tensors
from flare.optim.optimizer import optimizer_tensors, parameter_groups
from flare.plan import activations
from flare.plan.activations import Microbatch
from flare.plan.capacity import GIB, MIB, usable_bytes
from flare.plan.flops import attention_forward_flops, token_flops
from flare.plan.inputs import PlanInputs
from flare.plan.memory import loss_bytes, memory
from flare.plan.model_shape import HALF_BYTES, KNOWN_SHAPES, ModelShape, known_shape
from flare.plan.optimizer_state import ADAM_STATE_BYTES
from flare.plan.plan import check_fits, checkpoints_on_disk, make_plan
from flare.plan.suggest import largest_micro_batch, suggest
from flare.plan.table import plan_lines, time_words
from flare.plan.trainable import Trainable
from tests.processes import REPO

A800, A40 = ("NVIDIA A800 80GB PCIe", 81920), ("NVIDIA A40", 46068)
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
MODELS = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}

TINY = ModelShape("qwen2", 4, 8, 2, 1, 4, 16, 100, True, name="tiny")
"""By hand, per layer: q 64, k 32, v 32, o 64 weights, biases 8 + 4 + 4; MLP 3 x 128; norms 2 x 8."""


def qwen(name: str, stage: int, gpus: tuple = (), **changes: object) -> PlanInputs:
    """A shipped kind of run: the guide's NoPE band of a known model, one process a GPU."""
    shape = known_shape(f"Qwen/{name}")
    nope_layers = tuple(auto_band(shape.num_hidden_layers))
    return PlanInputs(shape, stage, nope_layers, world_size=len(gpus) or 1, gpus=gpus, **changes)


# --- shapes and parameters ---


def config_of(shape: ModelShape) -> Qwen2Config | Qwen3Config:
    sizes = {k: v for k, v in vars(shape).items() if k not in ("family", "name", "attention_bias")}
    if shape.family == "qwen2":
        del sizes["head_dim"]
    else:
        sizes["attention_bias"] = shape.attention_bias
    return CONFIGS[shape.family](**sizes)


def count(module: torch.nn.Module, part: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


def assert_counts(shape: ModelShape) -> None:
    """Every part of the shape against transformers' own model of the config, without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    layer = model.model.layers[0]
    assert shape.attention_params == count(layer, "self_attn.")
    assert shape.attention_matmul_params == count(layer, "proj.weight") - count(layer, "mlp.")
    assert shape.mlp_params == count(layer, "mlp.")
    assert shape.norm_params == count(layer, "layernorm.")
    assert shape.layer_params == count(layer)
    assert shape.embedding_params == count(model.model.embed_tokens)
    assert shape.final_norm_params == count(model.model.norm)
    assert shape.lm_head_params == count(model, "lm_head.")  # a tied weight is listed once, as the embedding
    assert shape.total_params == count(model)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_count_what_transformers_builds(name: str) -> None:
    assert_counts(KNOWN_SHAPES[name])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_shapes_count_what_transformers_builds(family: str, tied: bool) -> None:
    assert_counts(ModelShape(family, 2, 96, 6, 3, 16, 80, 50, tied))
    if family == "qwen3":
        assert_counts(ModelShape(family, 2, 96, 4, 2, 40, 80, 50, tied, attention_bias=True))


def test_qwen25_half_billion_by_hand() -> None:
    shape = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]
    layer = 896 * (896 + 128 + 128 + 896) + (896 + 128 + 128) + 3 * 896 * 4864 + 2 * 896
    assert shape.total_params == 151936 * 896 + 24 * layer + 896 == 494_032_768


def test_the_table_is_that_of_the_published_models() -> None:
    # Weights in the published checkpoints, as their pages on the hub say (a tied head once).
    billions = {
        "Qwen2.5-3B": 3.09,
        "Qwen2.5-7B": 7.62,
        "Qwen2.5-32B": 32.76,
        "Qwen3-4B": 4.02,
        "Qwen3-14B": 14.77,
    }
    for name, size in billions.items():
        assert round(KNOWN_SHAPES[f"Qwen/{name}"].total_params / 1e9, 2) == size
    assert len(KNOWN_SHAPES) == 12


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "Qwen/Qwen3-8B"])
def test_config_json_gives_the_known_shape(name: str) -> None:
    config = config_of(KNOWN_SHAPES[name]).to_dict()
    assert ModelShape.from_config(config, name) == KNOWN_SHAPES[name]
    nope = config | {"model_type": f"{config['model_type']}_nope", "nope_layers": [1]}
    assert ModelShape.from_config(nope, name) == KNOWN_SHAPES[name]


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    sizes |= {"vocab_size": 10, "num_key_value_heads": None}
    for family, config_class in CONFIGS.items():
        shape = ModelShape.from_config(sizes | {"model_type": family})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_class(**sizes))
        assert shape.query_size == model.model.layers[0].self_attn.q_proj.out_features
        assert shape.key_value_size == model.model.layers[0].self_attn.k_proj.out_features
        assert shape.total_params == count(model)


def test_bad_configs_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'llama'"):
        ModelShape.from_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"dir: num_hidden_layers, vocab_size must be"):
        sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 8}
        ModelShape.from_config(sizes | {"model_type": "qwen2"}, "dir")
    with pytest.raises(ConfigError, match=r"did you mean 'Qwen/Qwen2\.5-3B'"):
        known_shape("Qwen/Qwen25-3B")


def test_instruct_and_base_models_have_the_plain_shape() -> None:
    assert replace(known_shape("Qwen/Qwen2.5-3B-Instruct"), name="") == replace(
        KNOWN_SHAPES["Qwen/Qwen2.5-3B"], name=""
    )
    assert known_shape("Qwen/Qwen3-4B-Base").num_hidden_layers == 36


def test_trainable_parameters_by_hand() -> None:
    attention, layer = 192 + 16, 192 + 16 + 384 + 16
    assert Trainable.of("all").params(TINY) == 800 + 4 * layer + 8 == TINY.total_params
    assert Trainable.of({1, 2}).params(TINY) == 2 * layer
    assert Trainable.of({1, 2}, attention_only=True).params(TINY) == 2 * attention
    assert Trainable.of(()).params(TINY) == 0


# --- FLOPs ---


def test_flops_by_hand() -> None:
    # Per token: a layer's matrices have 576 weights, the head 800; attention forward 2 x T x 8 = 160.
    flops = token_flops(TINY, Trainable.of({1}), seq_len=10)
    assert flops.frozen_prefix == 2 * 576
    assert flops.frozen_above == 4 * (2 * 576 + 800)
    assert flops.trainable == 6 * 576
    assert flops.attention == 4 * 160 + 3 * 400
    assert flops.recompute == 0
    assert flops.model == 6 * (4 * 576 + 800) + 3 * 4 * 160
    assert flops.executed == 1152 + 7808 + 3456 + 1840
    selective = token_flops(TINY, Trainable.of({1}), 10, SELECTIVE)
    assert selective == flops  # norms and the like are not counted
    assert token_flops(TINY, Trainable.of({1}), 10, SELECTIVE, eager_attention=True).recompute == 3 * 160
    everything = token_flops(TINY, Trainable.of("all"), 10, gradient_checkpointing=True)
    assert everything.trainable == 6 * (4 * 576 + 800) and everything.frozen_above == 0
    assert everything.recompute == 4 * (2 * (576 - 128) + 160)


def test_attention_flops_are_those_of_a_causal_score_matrix() -> None:
    # T (T + 1) / 2 pairs of 2 heads; score and weighted sum are 2 x 4 FLOPs each; spread over T tokens.
    exact = 10 * 11 / 2 * 2 * (2 * 4 + 2 * 4) / 10
    assert attention_forward_flops(TINY, 10) == pytest.approx(exact, rel=1 / 10)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("train", ["all", "nope", "nope_attention"])
@pytest.mark.parametrize("checkpointing", [False, True, SELECTIVE])
def test_matmul_flops_are_those_that_torch_counts(family: str, train: str, checkpointing: bool | str) -> None:
    model, shape, trainable = tiny_training(family, train, True, checkpointing, vocab_size=128)
    ids, positions = rows_of_tokens(128, rows=1, seq_len=32, documents=1)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, positions).backward()
    counts = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    counted = sum(flops for op, flops in counts.items() if "mm" in op) / 32
    plain = token_flops(shape, trainable, 32, checkpointing)
    layers = shape.num_hidden_layers - trainable.first_backward(shape)
    attention_rerun = layers * attention_forward_flops(shape, 32) if checkpointing is True else 0
    # q, k and v of the lowest trained attention have no input gradient: the norm below is frozen.
    qkv = shape.hidden_size * (shape.query_size + 2 * shape.key_value_size)
    left_out = 2 * qkv if train == "nope_attention" else 0
    assert counted == plain.executed - plain.attention - attention_rerun - left_out


# --- saved activations and peak memory, against torch on the CPU ---


def tiny_training(
    family: str, train: str, bf16: bool, checkpointing: bool | str, attention: str = "sdpa", **changes: object
) -> tuple[TrainingModel, ModelShape, Trainable]:
    """A small model as the trainer prepares it: 6 layers, NoPE layers 2 and 3."""
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 100, "tie_word_embeddings": True}
    sizes |= {"head_dim": 24} if family == "qwen3" else {}
    torch.manual_seed(0)
    config = CONFIGS[family](**(sizes | changes), attn_implementation=attention)
    model = MODELS[family](config)
    remove_rope(model.model, [2, 3])
    trainable = Trainable.of("all" if train == "all" else {2, 3}, train == "nope_attention")
    set_trainable(model, trainable, "bf16" if bf16 else "fp32")
    model.train()
    training_model = TrainingModel(model, torch.bfloat16 if bf16 else None)
    apply_patches(training_model, gradient_checkpointing=checkpointing)
    assert trainable.params(ModelShape.from_config(config.to_dict())) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    return training_model, ModelShape.from_config(config.to_dict()), trainable


def rows_of_tokens(vocab_size: int, rows: int, seq_len: int, documents: int) -> tuple[torch.Tensor, ...]:
    """(input_ids, position_ids), each (B, T); several documents a row make SDPA use a mask."""
    length = seq_len // documents
    positions = (torch.arange(seq_len) % length).repeat(rows, 1)
    return torch.randint(0, vocab_size, (rows, seq_len)), positions


def saved_bytes(model: TrainingModel, ids: torch.Tensor, positions: torch.Tensor) -> int:
    """Bytes that are kept for the decoder's backward pass: unique storages, parameters excluded.

    By autograd, and of selectively checkpointed layers what their policy says is kept.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    keep = activation_checkpointing._policy
    storages: dict[int, torch.UntypedStorage] = {}

    def policy(*args: object, **kwargs: object) -> CheckpointPolicy:
        answer = keep(*args, **kwargs)
        if answer is CheckpointPolicy.MUST_SAVE:
            given = args[1].op_output
            for tensor in given if isinstance(given, tuple) else (given,):
                pack(tensor)
        return answer

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()  # held, so that no address is used twice
        if tensor.is_floating_point() and storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with (
        patch.object(activation_checkpointing, "_policy", policy),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=model.half_dtype is not None),
    ):
        model.causal_lm.model(input_ids=ids, position_ids=positions, use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("train", ["all", "nope", "nope_attention"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("documents", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, SELECTIVE, True])
def test_saved_activations(family: str, train: str, bf16: bool, documents: int, checkpointing: bool | str) -> None:
    model, shape, trainable = tiny_training(family, train, bf16, checkpointing)
    ids, positions = rows_of_tokens(100, rows=2, seq_len=96, documents=documents)
    batch = Microbatch(2, 96, bf16, trainable.everything, document_mask=documents > 1)
    expected = activations.final_norm_saved_bytes(shape, batch)
    if checkpointing:
        layers = shape.num_hidden_layers - trainable.first_backward(shape)
        expected += layers * activations.layer_input_bytes(shape, batch)
        expected += layers * activations.products_bytes(shape, batch) * (checkpointing == SELECTIVE)
    else:
        copies = sum(trainable.matmul_params(shape, i) for i in range(6)) if bf16 else 0
        expected += activations.rotary_bytes(shape, batch) + HALF_BYTES * copies
        expected += sum(activations.layer_saved_bytes(shape, batch, trainable, i) for i in range(6))
    assert expected == pytest.approx(saved_bytes(model, ids, positions), rel=0.02)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("train", ["all", "nope"])
def test_saved_activations_of_eager_attention(train: str, bf16: bool) -> None:
    model, shape, trainable = tiny_training("qwen3", train, bf16, False, attention="eager")
    ids, positions = rows_of_tokens(100, rows=1, seq_len=256, documents=2)
    batch = Microbatch(1, 256, bf16, trainable.everything, eager_attention=True)
    copies = sum(trainable.matmul_params(shape, i) for i in range(6)) if bf16 else 0
    expected = activations.final_norm_saved_bytes(shape, batch) + HALF_BYTES * copies
    expected += sum(activations.layer_saved_bytes(shape, batch, trainable, i) for i in range(6))
    assert expected == pytest.approx(saved_bytes(model, ids, positions), rel=0.02)


def test_layers_below_the_lowest_trainable_one_save_nothing() -> None:
    batch, trainable = Microbatch(1, 10, False, False), Trainable.of({2})
    saved = [activations.layer_saved_bytes(TINY, batch, trainable, i) for i in range(4)]
    assert saved[:2] == [0, 0] and saved[2] > saved[3] > 0


def test_saved_bytes_of_a_trainable_layer_by_hand() -> None:
    # bf16, stage 1, T = 10 rows of width 8, MLP 16, q 8, k and v 4 (8 with a mask), 2 heads; not the lowest.
    norm = 2 * 80 + 4 * 10  # bf16 input, fp32 1/rms
    attention = 2 * (80 + 80 + 80 + 80) + 4 * 10 * 2 + 2 * 100  # q, k, v, out; logsumexp; mask
    mlp = 2 * 3 * 160  # gate, up, their product
    inputs = 2 * 2 * 80  # of q, k and v, and of gate and up: a norm's output in bf16
    batch = Microbatch(1, 10, half=True, fp32_residual=False)
    assert activations.layer_saved_bytes(TINY, batch, Trainable.of({1, 2}), 2) == 2 * norm + attention + mlp + inputs


LONG_CASES = {  # activations and the loss decide
    "layers' backward": {},
    "checkpointing": {"checkpointing": True},
    "selective": {"checkpointing": SELECTIVE},
    "selective, no document mask": {"checkpointing": SELECTIVE, "documents": 1},
    "selective, eager attention": {"checkpointing": SELECTIVE, "attention": "eager", "rows": 1, "seq_len": 512},
    "no document mask": {"documents": 1},
    "loss": {"vocab_size": 12000, "checkpointing": True},
    "accumulation": {"accumulation": 2, "checkpointing": True},
    "long rows": {
        "rows": 1,
        "seq_len": 1024,
        "hidden_size": 64,
        "intermediate_size": 256,
        "checkpointing": True,
    },
    "eager attention": {"attention": "eager", "rows": 1, "seq_len": 512},
}
SHORT_CASES = {  # weights, their gradients and their copies decide
    "wide loss": {"vocab_size": 8000, "hidden_size": 512, "seq_len": 300},
    "embedding": {"vocab_size": 9000},
    "accumulated embedding": {"vocab_size": 9000, "accumulation": 2},
    "untied": {"vocab_size": 9000, "tie_word_embeddings": False},
    "copies": {"accumulation": 2, "intermediate_size": 3000},
    "optimizer": {"vocab_size": 9000, "fused": False},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """bf16 matmuls on a busy two-core machine take ten times as long with two threads as with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", LONG_CASES)
@pytest.mark.parametrize("train", ["all", "nope"])
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_memory_of_a_step(case: str, train: str, bf16: bool) -> None:
    assert_peak("qwen3" if case in ("checkpointing", "selective") else "qwen2", train, bf16, **LONG_CASES[case])


@pytest.mark.parametrize("case", SHORT_CASES)
@pytest.mark.parametrize("bf16", [False, True])
def test_peak_memory_of_a_step_with_few_tokens(case: str, bf16: bool) -> None:
    few_tokens = {"rows": 1, "seq_len": 16, "checkpointing": True}
    assert_peak("qwen2", "all", bf16, **(few_tokens | SHORT_CASES[case]))


def assert_peak(
    family: str,
    train: str,
    bf16: bool,
    rows: int = 2,
    seq_len: int = 256,
    documents: int = 2,
    accumulation: int = 1,
    checkpointing: bool | str = False,
    fused: bool = True,
    attention: str = "sdpa",
    **sizes: object,
) -> None:
    """The plan of a whole optimizer step, less what is resident, within 3 % of what torch allocates."""
    sizes = {"hidden_size": 128, "intermediate_size": 512} | sizes
    model, shape, trainable = tiny_training(family, train, bf16, checkpointing, attention, **sizes)
    groups = parameter_groups(model.trainable_parameters(), 0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=fused)
    ids, positions = rows_of_tokens(shape.vocab_size, rows, seq_len, documents)

    def step() -> None:
        for _ in range(accumulation):
            model(ids, ids, positions).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state, which is resident
    inputs = PlanInputs(
        shape,
        trainable=Trainable.of("all" if train == "all" else (2, 3)),
        precision="bf16" if bf16 else "fp32",
        per_device_batch=rows,
        accumulation=accumulation,
        seq_len=seq_len,
        gradient_checkpointing=checkpointing,
        document_mask=documents > 1,
        optimizer="adamw_torch_fused" if fused else "adamw_torch",
        attn_implementation=attention,
    )
    need = memory(inputs)
    moments = ADAM_STATE_BYTES * trainable.params(shape)
    assert need.peak_bytes - need.weights - moments == pytest.approx(allocated_peak(step), rel=0.03)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = optimizer_tensors(optimizer)
    assert need.weights == weights
    assert moments == sum(t.nbytes for name, t in state.items() if not name.endswith("|step"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(4000, 128), (3000, 1024)])
def test_peak_memory_of_the_loss(dtype: torch.dtype, head_trains: bool, vocab_size: int, hidden_size: int) -> None:
    # Not a leaf, as in the model: its gradient is passed on, not stored.
    hidden = torch.randn(1024, hidden_size, dtype=dtype) + torch.zeros(1, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab_size, hidden_size).requires_grad_(head_trains)
    weight = weight if head_trains else weight.to(dtype)
    labels = torch.randint(0, vocab_size, (1024,))
    shape = replace(TINY, vocab_size=vocab_size, hidden_size=hidden_size)
    batch = Microbatch(1, 1024, dtype != torch.float32, head_trains, fp16=dtype == torch.float16)
    expected = loss_bytes(shape, batch, head_trains)
    peak = allocated_peak(lambda: linear_cross_entropy.linear_cross_entropy_sum(hidden, weight, labels).backward())
    scratch = (
        0 if head_trains or batch.fp16 else scratch_of_a_product(1024, weight)
    )  # with its gradient, another moment is the peak
    assert expected == pytest.approx(peak - scratch, rel=0.05)


def scratch_of_a_product(rows: int, weight: torch.Tensor) -> int:
    """Bytes that oneDNN works in for (rows, V) @ (V, H): a few MB at every size, which no formula has."""
    gradient, out = weight.new_zeros(rows, len(weight)), weight.new_empty(rows, weight.shape[1])
    return allocated_peak(lambda: torch.mm(gradient, weight.detach(), out=out))


# --- memory of real shapes ---


def test_memory_parts_of_the_guides_stage_1() -> None:
    """Qwen2.5-3B, layers 20-32: by hand 13 x 77,076,992 trainable of 3,085,938,688 parameters."""
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,) * 4, per_device_batch=3))
    trainable, frozen = 13 * 77_076_992, 3_085_938_688 - 13 * 77_076_992
    assert (made.trainable_params, made.frozen_params) == (trainable, frozen)
    need = made.memory
    assert need.weights == 2 * frozen + 4 * trainable
    assert (need.gradients, need.optimizer) == (4 * trainable, 8 * trainable)
    assert need.weight_copies == 2 * 13 * (77_076_992 - 2560 - 2 * 2048)
    # One chunk: 1024 rows of logits on a GPU, in fp32 and in bf16; bf16 hidden states and their gradient.
    assert need.logits == (4 + 2) * 1024 * 151936 + 2 * 2 * 3 * 4096 * 2048
    assert made.tokens_per_step == 4 * 3 * 4096
    assert made.fits is True
    check_fits(made)


def test_stage_1_of_the_guide_fits_both_gpus_of_its_server_and_a_fourth_row_only_the_a800() -> None:
    for gpu in (A800, A40):
        made = make_plan(qwen("Qwen2.5-3B", 1, (gpu,), per_device_batch=3, seq_len=4096))
        assert 30 * GIB < made.memory.peak_bytes < 40 * GIB
        check_fits(made)
    check_fits(make_plan(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=4, seq_len=4096)))
    on_a40 = make_plan(qwen("Qwen2.5-3B", 1, (A40,), per_device_batch=4, seq_len=4096))
    assert on_a40.fits is False
    with pytest.raises(ConfigError, match="does not fit on 1 x NVIDIA A40"):
        check_fits(on_a40)


def test_qwen25_7b_stage_2_on_one_a40_is_refused_with_numbers_and_a_way_out() -> None:
    made = make_plan(qwen("Qwen2.5-7B", 2, (A40,), per_device_batch=2, gradient_checkpointing=True))
    assert made.memory.peak_bytes >= 16 * 7_615_616_512  # masters, gradients and two moments in fp32
    with pytest.raises(ConfigError) as caught:
        check_fits(made)
    message = str(caught.value)
    assert "\n" not in message
    assert "stage 2 of Qwen/Qwen2.5-7B does not fit on 1 x NVIDIA A40" in message
    assert f"needs {made.memory.peak_bytes / GIB:.2f} GiB of 44.99 GiB (41.59 GiB usable)" in message
    assert "weights 28.37 GiB" in message and "optimizer 56.74 GiB" in message
    assert "nothing fits with DDP" in message
    assert "--train_layers nope_attention" in message and "--model_name_or_path Qwen/Qwen2.5-1.5B" in message
    one_row, band = replace(made.inputs, per_device_batch=1), made.inputs.nope_layers
    ways = [
        replace(one_row, trainable=Trainable.of(band, attention_only=True)),
        replace(one_row, shape=known_shape("Qwen/Qwen2.5-1.5B")),
    ]
    assert [make_plan(way).fits for way in ways] == [True, True]
    assert make_plan(replace(ways[1], shape=known_shape("Qwen/Qwen2.5-3B"))).fits is False
    gpu = int(re.search(r"GPUs with (\d+) GiB", message)[1])
    for gib, fits in ((gpu, True), (gpu - 1, False)):
        inputs = replace(one_row, accumulation=2, gpus=(("GPU", gib * 1024),))
        assert make_plan(inputs).fits is fits


def test_ddp_gradients_are_resident_and_fsdp_divides_what_ddp_copies() -> None:
    one = qwen("Qwen2.5-7B", 2, per_device_batch=1, gradient_checkpointing=True)
    four = replace(one, world_size=4)
    ddp, fsdp = memory(four), memory(replace(four, parallel="fsdp"))
    assert ddp.weights == memory(one).weights == 4 * fsdp.weights
    assert (ddp.gradients, ddp.optimizer) == (4 * fsdp.gradients, 4 * fsdp.optimizer)
    assert ddp.peak_bytes > memory(one).peak_bytes  # buckets outlive the backward pass
    assert fsdp.weight_copies >= 2 * one.shape.embedding_params
    assert fsdp.peak_bytes < ddp.peak_bytes / 2
    assert memory(replace(one, parallel="fsdp")) == memory(one)


def test_what_costs_memory() -> None:
    base = qwen("Qwen2.5-3B", 1, per_device_batch=2)
    peak = memory(base).peak_bytes
    assert memory(replace(base, gradient_checkpointing=True)).peak_bytes < peak
    selective = memory(replace(base, gradient_checkpointing=SELECTIVE)).peak_bytes
    assert memory(replace(base, gradient_checkpointing=True)).peak_bytes < selective < peak
    assert memory(replace(base, document_mask=False)).peak_bytes < peak
    assert memory(replace(base, trainable=Trainable.of(base.nope_layers, attention_only=True))).peak_bytes < peak
    longer_prefix = replace(base, trainable=Trainable.of(range(23, 36)))
    assert memory(longer_prefix).peak_bytes < peak
    assert memory(replace(base, attn_implementation="eager")).peak_bytes > peak
    assert memory(replace(base, precision="fp32")).peak_bytes > peak
    assert memory(replace(base, world_size=2)).peak_bytes >= peak


def test_reserve_by_hand() -> None:
    assert usable_bytes(46068 * MIB) == int(46068 * MIB * 0.94) - int(0.7 * GIB)
    assert usable_bytes(MIB) == 0


def test_unknown_memory_is_no_verdict() -> None:
    made = make_plan(qwen("Qwen3-32B", 2, (("NVIDIA Odd", None),)))
    assert made.fits is None and suggest(made.inputs) == ""
    check_fits(made)
    assert any("not known" in line for line in plan_lines(made))
    # A known GPU beside it still counts.
    assert make_plan(qwen("Qwen3-32B", 2, (("NVIDIA Odd", None), A40))).fits is False


# --- what would fit ---


@pytest.mark.parametrize("limit_gib", [30, 60])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_largest_micro_batch_is_the_last_that_fits(limit_gib: int, checkpointing: bool) -> None:
    inputs = qwen("Qwen2.5-3B", 1, gradient_checkpointing=checkpointing)
    rows = largest_micro_batch(inputs, limit_gib * GIB)
    assert rows >= 1
    assert memory(replace(inputs, per_device_batch=rows)).peak_bytes <= limit_gib * GIB
    assert memory(replace(inputs, per_device_batch=rows + 1)).peak_bytes > limit_gib * GIB


def test_largest_micro_batch_is_zero_when_a_row_is_too_much() -> None:
    assert largest_micro_batch(qwen("Qwen2.5-7B", 2), 40 * GIB) == 0


def apply_flags(inputs: PlanInputs, words: str) -> PlanInputs:
    """The inputs that a suggested way of ``suggest`` asks for."""
    fields = {
        "--per_device_train_batch_size": "per_device_batch",
        "--gradient_accumulation_steps": "accumulation",
        "--max_seq_length": "seq_len",
        "--nproc_per_node": "world_size",
    }
    tokens, changes = shlex.split(words.split(" (")[0]), {}
    while tokens:
        flag = tokens.pop(0)
        if flag == "--gradient_checkpointing":
            changes["gradient_checkpointing"] = tokens.pop(0) if tokens[:1] == [SELECTIVE] else True
        elif flag == "--parallel":
            changes["parallel"] = tokens.pop(0)
        else:
            changes[fields[flag]] = int(tokens.pop(0))
    return replace(inputs, **changes)


def too_big() -> list[PlanInputs]:
    """Runs that do not fit and could: every shape, both stages, both GPUs, long and short rows."""
    found = []
    for name in KNOWN_SHAPES:
        for stage in (1, 2):
            for gpus in ((A40,), (A800,) * 4):
                for rows, seq_len in ((12, 4096), (2, 65536)):
                    sizes = {"per_device_batch": rows, "seq_len": seq_len}
                    inputs = qwen(name.removeprefix("Qwen/"), stage, gpus, **sizes)
                    if not make_plan(inputs).fits and suggest(inputs).startswith("what fits"):
                        found.append(inputs)
    return found


def test_every_suggestion_fits_and_keeps_the_global_batch() -> None:
    cases = too_big()
    assert len(cases) > 10
    kinds = set()
    for inputs in cases:
        for way in suggest(inputs).removeprefix("what fits: ").split("; or "):
            changed = apply_flags(inputs, way)
            assert changed != inputs
            assert make_plan(changed).fits is True, (inputs, way)
            assert changed.global_batch_size == inputs.global_batch_size
            kinds |= set(re.findall(r"--\w+|selective", way))
    flags = {
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "max_seq_length",
        "parallel",
    }
    assert kinds == {f"--{flag}" for flag in flags} | {SELECTIVE}


def test_rows_are_halved_until_one_fits() -> None:
    inputs = qwen("Qwen2.5-7B", 1, (A800,), per_device_batch=2, seq_len=131072)
    (way,) = suggest(inputs).removeprefix("what fits: ").split("; or ")
    changed = apply_flags(inputs, way)
    assert (changed.per_device_batch, changed.accumulation) == (1, 2)
    assert changed.seq_len < inputs.seq_len // 2 and changed.gradient_checkpointing
    assert make_plan(changed).fits is True
    assert make_plan(replace(changed, seq_len=changed.seq_len * 2)).fits is False


def test_more_gpus_are_offered_instead_of_accumulation() -> None:
    inputs = qwen("Qwen2.5-3B", 1, (A40,) * 2, per_device_batch=6)
    text = suggest(inputs)
    assert "--per_device_train_batch_size 3 --gradient_accumulation_steps 2 (or 2 times as many GPUs" in text
    assert make_plan(replace(inputs, per_device_batch=3, world_size=4, gpus=(A40,) * 4)).fits is True


def test_small_gpus_among_large_ones_are_named() -> None:
    mixed = make_plan(qwen("Qwen2.5-3B", 1, (A800, A40, A800), per_device_batch=4))
    assert [room.label for room in mixed.rooms] == ["2 x NVIDIA A800 80GB PCIe", "1 x NVIDIA A40"]
    assert [room.label for room in mixed.tight_rooms] == ["1 x NVIDIA A40"]
    message = r"does not fit on 1 x NVIDIA A40.*only the 2 x NVIDIA A800 80GB PCIe"
    with pytest.raises(ConfigError, match=message):
        check_fits(mixed)
    both_small = make_plan(qwen("Qwen2.5-3B", 1, (("NVIDIA A30", 24576), A40), per_device_batch=3))
    with pytest.raises(ConfigError, match="does not fit on 1 x NVIDIA A30"):
        check_fits(both_small)


def test_nothing_is_suggested_where_all_is_well() -> None:
    assert suggest(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=3)) == ""


# --- CPU ---


def test_available_ram_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n", encoding="ascii")
    assert read_available_ram(meminfo) == 8_000_000 * 1024
    meminfo.write_text("MemTotal: 1 kB\n", encoding="ascii")
    assert read_available_ram(meminfo) is None
    assert read_available_ram(tmp_path / "absent") is None


def test_cpu_processes_share_the_memory_of_their_host() -> None:
    shape, ram = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"], 24 * GIB
    inputs = PlanInputs(shape, 2, precision="fp32", world_size=4, available_ram_bytes=ram, seq_len=512)
    made = make_plan(inputs)
    assert made.rooms[0].total_bytes == ram // 4 and made.fits is False
    message = r"does not fit on CPU, 4 processes: .* per process: .*--nproc_per_node 1"
    with pytest.raises(ConfigError, match=message):
        check_fits(made)
    way = suggest(inputs).removeprefix("what fits: ").split("; or ")[0]
    changed = apply_flags(inputs, way)
    assert (changed.world_size, changed.accumulation) == (1, 4)
    assert make_plan(changed).fits is True
    assert make_plan(replace(inputs, world_size=8, processes_per_host=2)).rooms[0].total_bytes == ram // 2


# --- disk ---


def test_disk_by_hand() -> None:
    inputs = PlanInputs(TINY, 1, (1,), save_total_limit=3)
    layer, total = 608, 800 + 4 * 608 + 8
    made = make_plan(inputs)
    assert made.checkpoint_bytes == 2 * (total - layer) + 12 * layer
    assert made.final_model_bytes == 2 * total
    assert made.disk_bytes == 4 * made.checkpoint_bytes + made.final_model_bytes


@pytest.mark.parametrize(
    ("changes", "checkpoints"),
    [
        ({"save_total_limit": 3}, 4),
        ({"save_total_limit": 3, "keeps_best": True}, 5),
        ({"save_total_limit": 3, "num_saves": 2}, 2),
        ({"save_total_limit": 1, "num_saves": 9}, 2),
        ({"save_total_limit": None, "num_saves": 7}, 7),
    ],
)
def test_checkpoints_at_the_fullest_moment(changes: dict, checkpoints: int) -> None:
    assert checkpoints_on_disk(PlanInputs(TINY, **changes)) == checkpoints


@pytest.mark.parametrize("train", ["all", "nope"])
def test_checkpoint_bytes_are_those_of_a_written_checkpoint(train: str, tmp_path: Path) -> None:
    model, shape, _ = tiny_training("qwen3", train, True, False, hidden_size=256, intermediate_size=768)
    optimizer = torch.optim.AdamW(parameter_groups(model.trainable_parameters(), 0.0), fused=True)
    ids, positions = rows_of_tokens(100, 1, 16, 1)
    model(ids, ids, positions).backward()
    optimizer.step()
    save_tensors(model_tensors(model.causal_lm), tmp_path / "model.safetensors")
    save_tensors(optimizer_tensors(optimizer), tmp_path / "optimizer.safetensors")
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    trainable = Trainable.of("all" if train == "all" else (2, 3))
    made = make_plan(PlanInputs(shape, trainable=trainable))
    assert made.checkpoint_bytes == pytest.approx(written, rel=0.01)


def test_a_disk_without_room_for_one_checkpoint_is_an_error() -> None:
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=3, free_disk_bytes=10 * GIB))
    message = r"15\.08 GiB, and the output directory has 10\.00 GiB free.*--base_output_dir"
    with pytest.raises(EnvError, match=message):
        check_fits(made)


def test_a_disk_too_small_for_all_checkpoints_is_told_in_the_table() -> None:
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=3, free_disk_bytes=60 * GIB))
    check_fits(made)
    assert "TOO LITTLE, --save_total_limit 2 fits" in " ".join(" ".join(plan_lines(made)).split())
    cured = make_plan(replace(made.inputs, save_total_limit=2))
    assert cured.disk_bytes <= 60 * GIB < make_plan(replace(made.inputs, save_total_limit=3)).disk_bytes


# --- the table ---


@cache
def all_tables() -> dict[str, list[str]]:
    scattered = tuple(range(1, 28, 2))
    tables = {}
    for name, shape in KNOWN_SHAPES.items():
        for stage in (1, 2):
            inputs = PlanInputs(
                shape,
                stage,
                scattered,
                world_size=8,
                gpus=(A800,) * 4 + (A40,) * 4,
                gradient_checkpointing=stage == 2,
                free_disk_bytes=GIB,
                trainable=Trainable.of(scattered, attention_only=True) if stage == 1 else None,
            )
            tables[f"{name} stage {stage}"] = plan_lines(make_plan(inputs))
    return tables


def test_tables_of_all_shapes_are_aligned_and_at_most_100_columns_wide() -> None:
    for name, lines in all_tables().items():
        assert max(map(len, lines)) <= 100, name
        part = re.compile(r"^(memory/GPU)?\s+\w[\w' ]*\s{2,}[\d.]+ GiB")
        gib = [line.index("GiB") for line in lines if part.match(line)]
        assert len(gib) == 8 and len(set(gib)) == 1, lines


def test_the_table_tells_what_section_4_asks_for() -> None:
    made = make_plan(qwen("Qwen2.5-3B", 1, (A800,) * 4, per_device_batch=3, free_disk_bytes=200 * GIB))
    text = " ".join(" ".join(plan_lines(made)).split())
    for part in (
        "Qwen/Qwen2.5-3B: 3.09 B parameters, 36 layers",
        "stage 1 trains 1.00 B (layers 20-32), frozen 2.08 B",
        "NoPE layers 20-32",
        "bf16, DDP, gradient checkpointing off",
        "3 rows x 1 accumulation x 4 processes = 12 rows of 4096 = 49,152 tokens a step",
        "weights 7.61 GiB",
        "4 x NVIDIA A800 80GB PCIe: 80.00 GiB, 74.50 GiB usable: fits",
        "4 x checkpoint 15.08 GiB + final model 5.75 GiB = 66.07 GiB; 200.00 GiB free",
    ):
        assert part in text
    flops = made.flops
    assert f"executed {flops.executed / 1e9:.2f} GFLOP" in text
    assert f"frozen prefix {2 * 20 * 77_070_336 / 1e9:.2f} GFLOP" in text


def test_the_time_is_told_where_a_rate_is_known() -> None:
    def told(**known: object) -> str:
        lines = plan_lines(make_plan(qwen("Qwen2.5-3B", 1, **known)))
        return "".join(line for line in lines if line.startswith("time "))

    tokens = make_plan(qwen("Qwen2.5-3B", 1)).tokens_per_step
    assert told(steps_left=100) == ""
    assert "1 h 40 min for 100 steps at " in told(steps_left=100, tokens_per_sec=tokens / 60)
    assert time_words(10, tokens, tokens / 60).startswith("10 min for 10 steps at ")
    assert time_words(3000, tokens, tokens / 60).startswith("2 d 2 h for 3,000 steps at ")


def test_the_table_names_selective_checkpointing() -> None:
    lines = "\n".join(plan_lines(make_plan(qwen("Qwen2.5-3B", 2, (A800,), gradient_checkpointing=SELECTIVE))))
    assert "gradient checkpointing selective" in lines


def test_where_ddp_does_not_fit_the_plan_tells_how_many_gpus_do_when_sharded() -> None:
    """Qwen2.5-7B whole: 28 GB of masters, 57 of moments, 28 of gradients; an A40 has 41.6 GiB to use."""
    one = qwen("Qwen2.5-7B", 2, (A40,))
    gpus = int(re.search(r"(\d+) such GPUs with --parallel fsdp", suggest(one))[1])
    assert 3 <= gpus <= 6
    modest = replace(one, per_device_batch=1, gradient_checkpointing=True, parallel="fsdp")
    for count, fits in ((gpus, True), (gpus - 1, False)):
        assert make_plan(replace(modest, world_size=count, gpus=(A40,) * count)).fits is fits
    eight = replace(one, world_size=8, gpus=(A800,) * 8, per_device_batch=1, gradient_checkpointing=True)
    assert make_plan(eight).fits is False
    assert "--parallel fsdp" in suggest(eight)
    assert make_plan(replace(eight, parallel="fsdp")).fits is True
    assert "FSDP2 over 8 processes" in "\n".join(plan_lines(make_plan(replace(eight, parallel="fsdp"))))


def test_the_plan_needs_no_torch() -> None:
    code = "import flare.plan.table, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0

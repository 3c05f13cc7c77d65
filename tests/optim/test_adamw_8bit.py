"""``--optim adamw_torch_8bit``: torchao's numbers, the plan's bytes, checkpoints that any number of ranks reads."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.allocated import allocated_peak
from flare.checkpoint.tensor_files import TensorReader
from flare.config.options import Options
from flare.errors import CheckpointError, EnvError
from flare.nope.weight_files import save_tensors
from flare.optim import adamw_8bit
from flare.optim import optimizer as optimizer_module
from flare.optim.optimizer import build_optimizer, load_optimizer_tensors, optimizer_step, optimizer_tensors
from flare.plan import optimizer_state
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory, moments_bytes
from flare.plan.model_shape import KNOWN_SHAPES
from flare.plan.optimizer_state import ADAM_STATE_BYTES, EIGHT_BIT, block_size, moment_bytes
from flare.plan.plan import make_plan
from flare.plan.suggest import suggest
from flare.plan.trainable import Trainable
from flare.run import optional_packages
from flare.run.optional_packages import check_torchao
from tests.conftest import write_base
from tests.plan.test_plan import TINY, qwen, tiny_training
from tests.processes import torchrun, train

needs_torchao = pytest.mark.skipif(
    optional_packages.find_spec("torchao") is None, reason="torchao is not installed (requirements-dev.txt)"
)
SHAPES = {
    "wide": (96, 512), "tall": (512, 256), "narrow": (64, 128), "odd": (130, 96), "bias": (512,), "small": (8, 256),
}  # fmt: skip


def build(kind: str = EIGHT_BIT, seed: int = 0, **shapes: tuple) -> torch.optim.Optimizer:
    torch.manual_seed(seed)
    named = [(name, torch.nn.Parameter(torch.randn(shape))) for name, shape in (shapes or SHAPES).items()]
    return build_optimizer(named, Options(optim=kind, learning_rate=1e-3, weight_decay=0.1))


def run(optimizer: torch.optim.Optimizer, steps: range = range(5)) -> dict[str, torch.Tensor]:
    """Steps with gradients that depend on the step only; returns the parameters."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _, parameter in optimizer_module.named_parameters(optimizer):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer_step(optimizer, 1e-3 / (step + 1))
    return {name: parameter.detach() for name, parameter in optimizer_module.named_parameters(optimizer)}


def stored(optimizer: torch.optim.Optimizer, directory: Path) -> TensorReader:
    directory.mkdir(exist_ok=True)
    save_tensors(optimizer_tensors(optimizer), directory / "optimizer.safetensors")
    return TensorReader.of_state(directory, "optimizer")


# --- what is held how ---


def test_blocks_lie_within_rows_of_matrices_that_are_not_small() -> None:
    blocks = {name: block_size(shape) for name, shape in SHAPES.items()}
    assert blocks == {"wide": 256, "tall": 256, "narrow": 128, "odd": None, "bias": None, "small": None}


def test_moment_bytes_by_hand() -> None:
    assert moment_bytes((96, 512), "adamw_torch_fused") == 96 * 512 * 8
    assert moment_bytes((96, 512), EIGHT_BIT) == 2 * (96 * 512 + 96 * 2 * 4 + 1024)
    assert moment_bytes((96, 512), EIGHT_BIT, shards=4) == 2 * (24 * 512 + 24 * 2 * 4 + 1024)
    assert moment_bytes((512,), EIGHT_BIT) == 512 * 8


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_every_known_model_needs_a_quarter_of_the_bytes(name: str) -> None:
    shape = KNOWN_SHAPES[name]
    for trainable in (Trainable.of("all"), Trainable.of((1, 2)), Trainable.of((1, 2), attention_only=True)):
        assert sum(map(math.prod, trainable.tensors(shape))) == trainable.params(shape)
        plain = PlanInputs(shape, trainable=trainable)
        eight = PlanInputs(shape, trainable=trainable, optimizer=EIGHT_BIT)
        assert moments_bytes(plain) == ADAM_STATE_BYTES * trainable.params(shape)
        assert 0.253 < moments_bytes(eight) / moments_bytes(plain) < 0.26
        assert make_plan(plain).checkpoint_bytes - make_plan(eight).checkpoint_bytes > 0.7 * moments_bytes(plain)


def test_without_torchao_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional_packages, "find_spec", lambda name: None)
    with pytest.raises(EnvError, match=r"^--optim adamw_torch_8bit needs the torchao package.*pip install torchao"):
        check_torchao(use_cuda=False)


@needs_torchao
def test_a_model_without_a_matrix_for_it_is_refused(train_flags: list[str]) -> None:
    result = train(*train_flags, "--optim", EIGHT_BIT, "--dry_run")
    assert result.returncode == 2
    assert "would have no moment in 8 bits: no trainable matrix has rows of a multiple of 128" in result.stderr


@needs_torchao
@pytest.mark.parametrize("train_what", ["all", "nope", "nope_attention"])
def test_planned_bytes_are_those_of_the_state(train_what: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 300}
    model, shape, trainable = tiny_training("qwen3", train_what, True, False, **sizes)
    optimizer = build_optimizer(model.trainable_parameters(), Options(optim=EIGHT_BIT, learning_rate=1e-3))
    counted = 0
    for state in optimizer.state.values():
        for key in adamw_8bit.MOMENTS:
            parts = [getattr(state[key], part, None) for part in ("codes", "scale", "qmap")]
            counted += sum(part.nbytes for part in parts) if parts[0] is not None else state[key].nbytes
    assert (
        memory(PlanInputs(shape, trainable=trainable, optimizer=EIGHT_BIT)).optimizer - update_bytes(shape, trainable)
        == counted
    )


def update_bytes(shape: object, trainable: Trainable) -> int:
    return optimizer_state.EAGER_UPDATE_BYTES * max(map(math.prod, trainable.tensors(shape)))


@needs_torchao
def test_planned_temporaries_are_those_of_the_largest_tensor() -> None:
    optimizer = build(only=(512, 1024))
    run(optimizer, range(1))
    peak = allocated_peak(lambda: optimizer_step(optimizer, 1e-3))
    assert peak == pytest.approx(optimizer_state.EAGER_UPDATE_BYTES * 512 * 1024, rel=0.02)


# --- the update ---


@needs_torchao
def test_the_update_is_torchaos_bit_for_bit() -> None:
    """Where rows are a multiple of 256, torchao's own blocks are ours."""
    shapes = {name: SHAPES[name] for name in ("wide", "tall", "bias", "small")}
    ours = build(**shapes)
    from torchao.optim import AdamW8bit

    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes.values()]
    groups = [
        {"params": [p for p in params if p.ndim == 2], "names": ["wide", "tall", "small"], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim == 1], "names": ["bias"], "weight_decay": 0.0},
    ]
    theirs = AdamW8bit(groups, lr=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(run(ours).values(), run(theirs).values(), strict=True))
    kinds = {name: type(theirs.state[p]["exp_avg"]).__name__ for name, p in optimizer_module.named_parameters(theirs)}
    assert kinds == {"wide": "OptimState8bit", "tall": "OptimState8bit", "small": "Tensor", "bias": "Tensor"}


@needs_torchao
def test_the_weights_stay_near_those_of_fp32_moments() -> None:
    """Twenty steps: the distance from fp32's weights as a share of the way that these have gone. What has fp32
    moments in both differs by rounding."""
    eight, plain = run(build(), range(20)), run(build("adamw_torch"), range(20))
    start = run(build("adamw_torch"), range(0))
    for name, weight in plain.items():
        moved, apart = (weight - start[name]).norm(), (weight - eight[name]).norm()
        assert apart < (0.02 if block_size(SHAPES[name]) else 5e-4) * moved, (name, apart / moved)


@needs_torchao
@pytest.mark.slow
def test_the_compiled_update_of_gpus_is_the_eager_one_of_cpus() -> None:
    """To a code's rounding; and it needs the two fp32 moments that the plan counts for GPUs, nothing else."""
    eager, compiled = build(only=(64, 512)), build(only=(64, 512))
    weights = run(eager)["only"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_module, "is_8bit", lambda optimizer: False)  # no care for the CPU
        torch.testing.assert_close(run(compiled)["only"], weights, rtol=1e-4, atol=1e-5)
        peak = allocated_peak(lambda: optimizer_step(compiled, 1e-3))
    assert peak == pytest.approx(optimizer_state.COMPILED_UPDATE_BYTES * 64 * 512, rel=0.02)


# --- checkpoints ---


@needs_torchao
def test_a_loaded_state_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(build(), range(6))
    first = build()
    weights = run(first, range(3))
    second = build(seed=1)
    load_optimizer_tensors(second, stored(first, tmp_path))
    for name, parameter in optimizer_module.named_parameters(second):
        parameter.data.copy_(weights[name])
    assert all(torch.equal(weight, whole[name]) for name, weight in run(second, range(3, 6)).items())


@needs_torchao
def test_files_hold_plain_tensors_by_name(tmp_path: Path) -> None:
    optimizer = build()
    run(optimizer)
    reader = stored(optimizer, tmp_path)
    tensors = {name: reader.read(name) for name in reader.names()}
    assert tensors["wide|exp_avg|codes"].dtype == torch.uint8 and tensors["wide|exp_avg|scale"].shape == (96, 2)
    assert tensors["bias|exp_avg"].dtype == torch.float32 and tensors["wide|step"] == 5
    codes, scale = tensors["wide|exp_avg|codes"].long(), tensors["wide|exp_avg|scale"]
    numbers = tensors["table|exp_avg"][codes] * scale.repeat_interleave(256, 1)
    moment = next(
        optimizer.state[p]["exp_avg"] for name, p in optimizer_module.named_parameters(optimizer) if name == "wide"
    )
    assert torch.equal(numbers, moment.dequantize())


@needs_torchao
def test_fp32_moments_are_rounded_and_8_bit_ones_decoded(tmp_path: Path) -> None:
    plain, eight, back = build("adamw_torch_fused"), build(), build("adamw_torch_fused")
    run(plain)
    load_optimizer_tensors(eight, stored(plain, tmp_path / "plain"))
    load_optimizer_tensors(back, stored(eight, tmp_path / "eight"))
    for (name, p), (_, q) in zip(
        optimizer_module.named_parameters(plain), optimizer_module.named_parameters(back), strict=True
    ):
        for key in adamw_8bit.MOMENTS:
            one, other = plain.state[p][key], back.state[q][key]
            if block_size(p.shape) is None:
                assert torch.equal(one, other)
            else:  # the coarsest step of 256 codes, and what is a millionth of its block's largest is zero
                top = one.view(len(p), -1, block_size(p.shape)).abs().amax(-1, keepdim=True)
                torch.testing.assert_close(other, one, rtol=0.07, atol=0.014 * float(top.max())), name
        assert back.state[q]["step"] == 5


@needs_torchao
def test_codes_of_another_meaning_and_missing_state_are_refused(tmp_path: Path) -> None:
    optimizer = build()
    tensors = optimizer_tensors(optimizer)
    save_tensors(tensors | {"table|exp_avg": tensors["table|exp_avg"] * 2}, tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="8-bit optimizer state has another quantization map"):
        load_optimizer_tensors(build(), TensorReader.of_state(tmp_path, "optimizer"))
    save_tensors({k: v for k, v in tensors.items() if k != "wide|exp_avg|scale"}, tmp_path / "optimizer.safetensors")
    with pytest.raises(KeyError, match=r"wide\|exp_avg\|scale"):
        load_optimizer_tensors(build(), TensorReader.of_state(tmp_path, "optimizer"))


@needs_torchao
def test_ranks_that_share_a_matrix_hold_the_same_bits_as_one(tmp_path: Path) -> None:
    """Two ranks with rows 17 and 16, 1 and none, ... (sharded_8bit.py), the same gradients as one process."""
    torchrun(2, "tests.optim.sharded_8bit", tmp_path)
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "in 8 bits": 2,
        "same as one process": True,
        "read by one process": True,
        "read by two": True,
        "rounded from fp32": True,
    }


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    return write_base(tmp_path_factory.mktemp("base") / "wide", **sizes)


@pytest.fixture
def wide_flags(train_flags: list[str], wide_base: Path) -> Iterator[list[str]]:
    changes = ["--model_name_or_path", wide_base, "--no_rope_layers", 1, "--save_steps", 3, "--stage", 2]
    return [*train_flags, *changes, "--optim", EIGHT_BIT, "--lr_scheduler_type", "constant"]


@needs_torchao
def test_a_run_resumes_to_the_same_bits_and_changes_its_optimizer_with_a_word(
    wide_flags: list[str], tmp_path: Path
) -> None:
    whole = train(*wide_flags, "--base_output_dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for steps in (3, 6):
        result = train(*wide_flags, "--max_steps", steps)
        assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-3" in result.stderr
    weights = [(tmp_path / out / "run/final_model/model.safetensors").read_bytes() for out in ("out", "whole")]
    assert weights[0] == weights[1]
    changed = train(*wide_flags, "--max_steps", 7, "--optim", "adamw_torch_fused")
    assert changed.returncode == 0, changed.stderr
    assert "optim adamw_torch_8bit -> adamw_torch_fused" in changed.stderr
    assert "moments are converted to fp32 from 8 bits" in changed.stderr


@needs_torchao
@pytest.mark.slow
def test_a_run_of_two_sharded_processes_goes_on_as_one(wide_flags: list[str], tmp_path: Path) -> None:
    """The losses of one process throughout, to what codes and sums over ranks round differently."""
    size = ["--global_batch_size", 4]
    one = train(*wide_flags, *size, "--base_output_dir", tmp_path / "one")
    assert one.returncode == 0, one.stderr
    for steps, processes, parallel in ((3, 2, "fsdp"), (6, 1, "ddp")):
        how = ["--max_steps", steps, "--nproc_per_node", processes, "--parallel", parallel]
        result = train(*wide_flags, *size, *how)
        assert result.returncode == 0, result.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "run/logs/metrics.jsonl").read_text().splitlines()
         if '"loss"' in line]
        for out in ("one", "out")
    ]  # fmt: skip
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_tiny_shape_of_the_plans_tests_has_nothing_to_hold_in_8_bits() -> None:
    assert not any(map(block_size, Trainable.of("all").tensors(TINY)))


def test_it_is_offered_where_nothing_else_on_these_gpus_fits() -> None:
    """Qwen2.5-7B whole on 96 GB: 28 GB of masters, 28 of gradients, 57 of moments in fp32, 15 in 8 bits."""
    gpu = ("NVIDIA RTX PRO 6000 Blackwell", 97887)
    inputs = qwen("Qwen2.5-7B", 2, (gpu,), per_device_batch=1, gradient_checkpointing=True)
    assert make_plan(inputs).fits is False
    assert re.search(rf"what would: .*--optim {EIGHT_BIT} \([\d.]+ GiB, 1 row at a time\)", suggest(inputs))
    assert make_plan(replace(inputs, optimizer=EIGHT_BIT)).fits is True

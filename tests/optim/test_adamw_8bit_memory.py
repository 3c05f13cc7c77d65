"""``--optim adamw_torch_8bit``: which moments are in 8 bits, and that the planned bytes are the real ones."""

import math
import re
from dataclasses import replace

import pytest

from benchmarks.allocated import allocated_peak
from flare.config.options import Options
from flare.errors import EnvError
from flare.optim import adamw_8bit
from flare.optim.optimizer import build_optimizer, optimizer_step
from flare.plan import optimizer_state
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory, optimizer_state_bytes
from flare.plan.model_shape import KNOWN_SHAPES
from flare.plan.optimizer_state import ADAM_STATE_BYTES, EIGHT_BIT, block_size, parameter_state_bytes
from flare.plan.plan import make_plan
from flare.plan.suggest import suggest
from flare.plan.trainable import Trainable
from flare.run import optional_packages
from flare.run.optional_packages import check_torchao
from tests.optim.eight_bit import SHAPES, build, needs_torchao, run
from tests.plan.test_plan import TINY, qwen, tiny_training
from tests.processes import train


def test_blocks_are_within_rows_of_matrices_that_are_not_small() -> None:
    blocks = {name: block_size(shape) for name, shape in SHAPES.items()}
    assert blocks == {"wide": 256, "tall": 256, "narrow": 128, "odd": None, "bias": None, "small": None}


def test_moment_bytes_by_hand() -> None:
    assert parameter_state_bytes((96, 512), "adamw_torch_fused") == 96 * 512 * 8
    assert parameter_state_bytes((96, 512), EIGHT_BIT) == 2 * (96 * 512 + 96 * 2 * 4 + 1024)
    assert parameter_state_bytes((96, 512), EIGHT_BIT, shards=4) == 2 * (24 * 512 + 24 * 2 * 4 + 1024)
    assert parameter_state_bytes((512,), EIGHT_BIT) == 512 * 8


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_every_known_model_needs_a_quarter_of_the_bytes(name: str) -> None:
    shape = KNOWN_SHAPES[name]
    for trainable in (Trainable.of("all"), Trainable.of((1, 2)), Trainable.of((1, 2), attention_only=True)):
        assert sum(map(math.prod, trainable.tensors(shape))) == trainable.params(shape)
        plain = PlanInputs(shape, trainable=trainable)
        eight = PlanInputs(shape, trainable=trainable, optimizer=EIGHT_BIT)
        assert optimizer_state_bytes(plain) == ADAM_STATE_BYTES * trainable.params(shape)
        assert 0.253 < optimizer_state_bytes(eight) / optimizer_state_bytes(plain) < 0.26
        assert make_plan(plain).checkpoint_bytes - make_plan(eight).checkpoint_bytes > 0.7 * optimizer_state_bytes(
            plain
        )


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


def test_the_tiny_shape_of_the_plans_tests_has_no_8_bit_moments() -> None:
    assert not any(map(block_size, Trainable.of("all").tensors(TINY)))


def test_it_is_suggested_where_nothing_else_on_these_gpus_fits() -> None:
    """Qwen2.5-7B unsharded on 96 GB: 28 GB of masters, 28 of gradients, 57 of moments in fp32, 15 in 8 bits."""
    gpu = ("NVIDIA RTX PRO 6000 Blackwell", 97887)
    inputs = qwen("Qwen2.5-7B", 2, (gpu,), per_device_batch=1, gradient_checkpointing=True)
    assert make_plan(inputs).fits is False
    assert re.search(rf"what would: .*--optim {EIGHT_BIT} \([\d.]+ GiB, 1 row at a time\)", suggest(inputs))
    assert make_plan(replace(inputs, optimizer=EIGHT_BIT)).fits is True

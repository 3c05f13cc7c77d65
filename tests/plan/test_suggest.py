"""Suggestions for runs that do not fit: each of them fits and keeps the global batch."""

import re
import shlex
from dataclasses import replace

import pytest

from benchmarks.gpu import largest_micro_batch
from flare.config.options import SELECTIVE
from flare.errors import ConfigError
from flare.plan.capacity import GIB
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory
from flare.plan.model_shape import KNOWN_SHAPES
from flare.plan.plan import check_fits, make_plan
from flare.plan.suggest import suggest
from flare.plan.table import plan_lines
from tests.plan.models import A40, A800, qwen


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
    """The inputs with a suggestion of ``suggest`` applied."""
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


def test_nothing_is_suggested_where_all_is_well() -> None:
    assert suggest(qwen("Qwen2.5-3B", 1, (A800,), per_device_batch=3)) == ""


def test_cpu_processes_share_the_memory_of_their_host() -> None:
    shape, ram = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"], 24 * GIB
    inputs = PlanInputs(shape, 2, precision="fp32", world_size=4, available_ram_bytes=ram, seq_len=512)
    made = make_plan(inputs)
    assert made.capacities[0].total_bytes == ram // 4 and made.fits is False
    message = r"does not fit on CPU, 4 processes: .* per process: .*--nproc_per_node 1"
    with pytest.raises(ConfigError, match=message):
        check_fits(made)
    way = suggest(inputs).removeprefix("what fits: ").split("; or ")[0]
    changed = apply_flags(inputs, way)
    assert (changed.world_size, changed.accumulation) == (1, 4)
    assert make_plan(changed).fits is True
    assert make_plan(replace(inputs, world_size=8, processes_per_host=2)).capacities[0].total_bytes == ram // 2


def test_where_ddp_does_not_fit_the_plan_says_how_many_gpus_fit_with_fsdp() -> None:
    """All of Qwen2.5-7B: 28 GB of masters, 57 of moments, 28 of gradients; an A40 has 41.6 GiB to use."""
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

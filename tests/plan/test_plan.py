"""Memory and disk of real shapes: what fits and what is refused."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flare.checkpoint.directory import model_tensors
from flare.config.options import SELECTIVE
from flare.cpu import read_available_ram
from flare.errors import ConfigError, EnvError
from flare.nope.weight_files import save_tensors
from flare.optim.optimizer import optimizer_tensors, parameter_groups
from flare.plan.capacity import GIB, MIB, usable_bytes
from flare.plan.inputs import PlanInputs
from flare.plan.memory import memory
from flare.plan.model_shape import known_shape
from flare.plan.plan import check_fits, checkpoints_on_disk, make_plan
from flare.plan.suggest import suggest
from flare.plan.table import plan_lines
from flare.plan.trainable import Trainable
from tests.plan.models import A40, A800, TINY, qwen, rows_of_tokens, tiny_training
from tests.processes import REPO


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


def test_qwen25_7b_stage_2_on_one_a40_is_refused_with_numbers_and_suggestions() -> None:
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


def test_unknown_memory_has_no_verdict() -> None:
    made = make_plan(qwen("Qwen3-32B", 2, (("NVIDIA Odd", None),)))
    assert made.fits is None and suggest(made.inputs) == ""
    check_fits(made)
    assert any("not known" in line for line in plan_lines(made))
    # A known GPU next to it still counts.
    assert make_plan(qwen("Qwen3-32B", 2, (("NVIDIA Odd", None), A40))).fits is False


def test_small_gpus_among_large_ones_are_named() -> None:
    mixed = make_plan(qwen("Qwen2.5-3B", 1, (A800, A40, A800), per_device_batch=4))
    assert [capacity.label for capacity in mixed.capacities] == ["2 x NVIDIA A800 80GB PCIe", "1 x NVIDIA A40"]
    assert [capacity.label for capacity in mixed.exceeded_capacities] == ["1 x NVIDIA A40"]
    message = r"does not fit on 1 x NVIDIA A40.*only the 2 x NVIDIA A800 80GB PCIe"
    with pytest.raises(ConfigError, match=message):
        check_fits(mixed)
    both_small = make_plan(qwen("Qwen2.5-3B", 1, (("NVIDIA A30", 24576), A40), per_device_batch=3))
    with pytest.raises(ConfigError, match="does not fit on 1 x NVIDIA A30"):
        check_fits(both_small)


def test_available_ram_is_read_from_meminfo(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n", encoding="ascii")
    assert read_available_ram(meminfo) == 8_000_000 * 1024
    meminfo.write_text("MemTotal: 1 kB\n", encoding="ascii")
    assert read_available_ram(meminfo) is None
    assert read_available_ram(tmp_path / "absent") is None


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


def test_the_plan_needs_no_torch() -> None:
    code = "import flare.plan.table, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, check=False).returncode == 0

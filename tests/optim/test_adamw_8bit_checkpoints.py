"""``--optim adamw_torch_8bit``: plain tensors in checkpoints, which any number of ranks and fp32 AdamW can read."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flare.checkpoint.tensor_files import TensorReader
from flare.errors import CheckpointError
from flare.nope.weight_files import save_tensors
from flare.optim import adamw_8bit
from flare.optim import optimizer as optimizer_module
from flare.optim.optimizer import load_optimizer_tensors, optimizer_tensors
from flare.plan.optimizer_state import EIGHT_BIT, block_size
from tests.conftest import write_base
from tests.optim.eight_bit import build, needs_torchao, run, stored
from tests.processes import torchrun, train


@needs_torchao
def test_a_loaded_state_continues_to_the_same_bits(tmp_path: Path) -> None:
    unbroken = run(build(), range(6))
    first = build()
    weights = run(first, range(3))
    second = build(seed=1)
    load_optimizer_tensors(second, stored(first, tmp_path))
    for name, parameter in optimizer_module.named_parameters(second):
        parameter.data.copy_(weights[name])
    assert all(torch.equal(weight, unbroken[name]) for name, weight in run(second, range(3, 6)).items())


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
def test_fp32_moments_are_quantized_and_8_bit_ones_dequantized(tmp_path: Path) -> None:
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
def test_another_quantization_map_and_missing_state_are_refused(tmp_path: Path) -> None:
    optimizer = build()
    tensors = optimizer_tensors(optimizer)
    save_tensors(tensors | {"table|exp_avg": tensors["table|exp_avg"] * 2}, tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="8-bit optimizer state has another quantization map"):
        load_optimizer_tensors(build(), TensorReader.of_state(tmp_path, "optimizer"))
    save_tensors({k: v for k, v in tensors.items() if k != "wide|exp_avg|scale"}, tmp_path / "optimizer.safetensors")
    with pytest.raises(KeyError, match=r"wide\|exp_avg\|scale"):
        load_optimizer_tensors(build(), TensorReader.of_state(tmp_path, "optimizer"))


@pytest.mark.slow
@needs_torchao
def test_sharded_moments_have_the_same_bits_as_those_of_one_process(tmp_path: Path) -> None:
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


@pytest.mark.slow
@needs_torchao
def test_a_run_resumes_to_the_same_bits_and_a_change_of_its_optimizer_is_logged(
    wide_flags: list[str], tmp_path: Path
) -> None:
    unbroken = train(*wide_flags, "--base_output_dir", tmp_path / "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    for steps in (3, 6):
        result = train(*wide_flags, "--max_steps", steps)
        assert result.returncode == 0, result.stderr
    assert "resumes from checkpoint-3" in result.stderr
    weights = [(tmp_path / out / "run/final_model/model.safetensors").read_bytes() for out in ("out", "unbroken")]
    assert weights[0] == weights[1]
    changed = train(*wide_flags, "--max_steps", 7, "--optim", "adamw_torch_fused")
    assert changed.returncode == 0, changed.stderr
    assert "optim adamw_torch_8bit -> adamw_torch_fused" in changed.stderr
    assert "moments are converted to fp32 from 8 bits" in changed.stderr


@needs_torchao
@pytest.mark.slow
def test_a_run_of_two_sharded_processes_continues_on_one(wide_flags: list[str], tmp_path: Path) -> None:
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

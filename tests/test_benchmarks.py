"""The benchmarks measure what they say: the same work on both sides, and plans that fit the GPUs they name."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu, record, scaling_paper
from benchmarks.workload import Measured, Workload, last_error, run_flare, run_hf
from flare.plan.model_shape import known_shape
from flare.plan.trainable import Trainable

SHAPE = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("stage", [1, 2])
def test_both_trainers_do_the_same_updates(stage: int) -> None:
    """Losses agree up to the one target a row that run_clm's shift leaves out (of 128)."""
    flare = Workload("flare", SHAPE, stage, [1, 3], batch_size=4, seq_len=128, steps=3)
    _, ours = run_flare(flare)
    seconds, theirs = run_hf(Workload(**vars(flare) | {"trainer": "hf"}))
    assert len(seconds) == len(theirs) == 3
    assert ours == pytest.approx(theirs, rel=3e-3)


def test_every_gpu_case_fits_the_gpus_of_the_project() -> None:
    for name, memory_mib in (("NVIDIA H200", 143771), ("NVIDIA H100 80GB HBM3", 81559)):
        for case in gpu.CASES:
            plan = gpu.planned(case, gpu.Place(name, memory_mib))
            assert plan is not None and plan.fits, (str(case), name)


@pytest.mark.slow
def test_the_gpu_script_goes_from_its_cases_to_its_file_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own processes and both trainers; only the sizes and the device are others."""
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert gpu.main(["--rehearse", "--only", "3B stage 2, checkpointing"]) == 0
    ours, theirs = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    for row in (ours, theirs):
        assert "error" not in row, row
        assert row["rows"] == gpu.MAX_BATCH_SIZE
        assert len(row["step_seconds"]) == gpu.STEPS - gpu.WARMUP_STEPS
        assert row["tokens_per_sec"] > 0
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
    assert ours["plan_bytes"] > 0
    assert theirs["plan_bytes"] is None


def test_a_case_that_runs_out_of_memory_is_tried_with_half_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(workload: Workload, limit_sec: float) -> Measured:
        if workload.batch_size > 1:
            raise RuntimeError("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
        return Measured([1.0], [5.0], 2**30, 0, workload.batch_size * workload.seq_len)

    monkeypatch.setattr(gpu, "measure", measure)
    row = gpu.run(gpu.CASES[0], gpu.rehearsal())
    assert (row["rows"], row["out_of_memory_at_rows"], row["tokens_per_sec"]) == (1, [4, 2], 64.0)
    assert len(gpu.line(row)) == 8

    def hangs(workload: Workload, limit_sec: float) -> Measured:
        raise RuntimeError("no result within 150 s")

    monkeypatch.setattr(gpu, "measure", hangs)
    assert gpu.run(gpu.CASES[0], gpu.rehearsal())["error"] == "no result within 150 s"


def test_the_error_of_a_workload_is_the_line_that_names_it() -> None:
    text = "Traceback ...\n  x\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n[rank0]: leaked\n"
    assert last_error(text) == "torch.OutOfMemoryError: CUDA out of memory. Tried"
    assert last_error("Killed\n") == "Killed"


def test_the_paper_model_of_scaling_counts_bytes_as_rings_do() -> None:
    """Hand-worked: 8 bytes among 4 GPUs of a host at 2 bytes a second: three quarters pass a link, in 3 s."""
    cluster = scaling_paper.Cluster("hand", 4, 1.0, 2.0, 1.0)
    assert cluster.collective_sec(8, 1) == 0
    assert cluster.collective_sec(8, 4) == pytest.approx(3 + 2 * scaling_paper.LATENCY_SEC)
    assert cluster.collective_sec(8, 8) == pytest.approx(7 + 3 * scaling_paper.LATENCY_SEC)  # the network is slower
    step = scaling_paper.Step(known_shape("Qwen/Qwen2.5-3B"), Trainable.of("all"), 2, 8)
    for gpus in (8, 1024):  # more accumulation hides DDP's one reduction, not FSDP2's many
        assert step.ddp_sec(scaling_paper.CLUSTERS[2], gpus) < step.fsdp_sec(scaling_paper.CLUSTERS[2], gpus)

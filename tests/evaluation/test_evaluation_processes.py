"""Results do not depend on batch size and processes; interrupted evaluations resume; wrong flags end with one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flare.evaluation.finished import FinishedParts, model_identity, texts_identity
from tests.conftest import write_corpus
from tests.evaluation.models import PROSE, bpe_tokenizer, tiny
from tests.evaluation.processes import RELATIVE, evaluate, same
from tests.processes import REPO, run_script, script_environment

TEXTS = [PROSE * n for n in (3, 1, 2, 5)]


@pytest.mark.slow
def test_results_do_not_depend_on_batch_size_and_number_of_processes(
    base_model: Path, documents: Path, tmp_path: Path
):
    flags = [
        "--model_path", base_model, "--datasets", documents, f"lambada={documents}", "--max_length", 64,
        "--stride", 48, "--context_lengths", "64,128",
    ]  # fmt: skip
    one = evaluate(tmp_path / "one", *flags, "--device", "cpu", "--batch_size", 1)
    two = evaluate(tmp_path / "two", *flags, "--gpu_type", "cpu", "--nproc_per_node", 2, "--batch_size", 8)
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    for key in ("model", "datasets", "context_lengths"):
        same(one[key], two[key])
    assert one["datasets"]["lambada"]["lambada_perplexity"] > 1
    assert len(one["context_lengths"][str(documents)]) == 2
    assert not (tmp_path / "one" / "unfinished").exists()


@pytest.mark.slow
def test_two_processes_agree_on_passkey_comparison_and_concat(base_model: Path, tmp_path: Path):
    """The other metrics, on a model with NoPE layers (the probe) and its base."""
    patched = tmp_path / "patched"
    flags = ["--model_name_or_path", base_model, "--no_rope_layers", "1-2", "--output_dir", patched]
    assert run_script("patch_qwen_rope.py", *flags).returncode == 0
    docs = write_corpus(tmp_path / "docs.jsonl", 9, seed=3)
    flags = [
        "--model_path", patched, "--compare_to", base_model, "--datasets", docs, "--protocol", "concat",
        "--max_length", 768, "--passkey", "--passkey_samples", 2, "--generate_tokens", 6,
    ]  # fmt: skip
    one = evaluate(tmp_path / "one", *flags, "--device", "cpu", "--batch_size", 1)
    two = evaluate(tmp_path / "two", *flags, "--gpu_type", "cpu", "--nproc_per_node", 2, "--batch_size", 8)
    for key in ("model", "datasets", "passkey", "comparison", "milestones", "samples", "verdict"):
        same(one[key], two[key])
    assert one["model"]["nope_probe"] == {"verified": True, "layers": [1, 2]}
    assert len(one["passkey"]) == 5 and {row["num_samples"] for row in one["passkey"]} == {2}
    assert one["comparison"]["datasets"][str(docs)]["loss_difference"] != 0
    for results in (one, two):
        assert results["throughput"]["tokens_per_sec"] > 0 and results["throughput"]["peak_memory_bytes"] > 0


@pytest.mark.slow
def test_several_processes_print_an_error_once(base_model: Path, tmp_path: Path):
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--datasets", "/nowhere.jsonl",
        "--output_dir", tmp_path, "--gpu_type", "cpu", "--nproc_per_node", 2,
    )  # fmt: skip
    assert result.returncode == 3
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr


@pytest.mark.slow
def test_killed_evaluation_reuses_finished_parts(base_model: Path, documents: Path, tmp_path: Path):
    """SIGKILL after the first data set: the second run takes that one from disk and scores the second only."""
    long = write_corpus(tmp_path / "long.jsonl", 4000, seed=1)
    flags = ["--model_path", base_model, "--datasets", documents, long, "--device", "cpu", "--generate_tokens", 0]
    out = tmp_path / "out"
    command = [sys.executable, REPO / "evaluate_model_enhanced.py", *flags, "--max_length", 16, "--output_dir", out]
    process = subprocess.Popen(
        list(map(str, command)), env=script_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "evaluation_results.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = json.loads((out / "evaluation_results.json").read_text())
    assert list(before["datasets"]) == [str(documents)]
    short = write_corpus(tmp_path / "long.jsonl", 30, seed=2)  # another second set: only the first may be reused
    again = run_script("evaluate_model_enhanced.py", *flags, "--max_length", 16, "--output_dir", out)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("finished before") == 1
    after = json.loads((out / "evaluation_results.json").read_text())
    assert after["datasets"][str(documents)] == before["datasets"][str(documents)]
    assert after["datasets"][str(short)]["num_documents"] == 30
    assert not (out / "unfinished").exists()


def test_finished_part_is_found_by_its_identity(tmp_path: Path):
    parts = FinishedParts(tmp_path)
    parts.write("dataset a/b", {"model": [1, 2], "max_length": 8}, {"loss": 1.25})
    assert parts.read("dataset a/b", {"max_length": 8, "model": [1, 2]}) == {"loss": 1.25}
    assert parts.read("dataset a/b", {"model": [1, 2], "max_length": 16}) is None
    (file,) = parts.directory.iterdir()
    file.write_text("{cut off")
    assert parts.read("dataset a/b", {"model": [1, 2], "max_length": 8}) is None
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w").write_text("1")
    before = model_identity(tmp_path / "m")
    os.utime(tmp_path / "m" / "w", (1, 1))
    assert model_identity(tmp_path / "m") != before
    assert texts_identity(["ab", "c"]) != texts_identity(["a", "bc"])


def test_offloaded_model_scores_the_same(tmp_path: Path):
    """Weights that live elsewhere until they are used, as a model too large for the GPU has them."""
    from accelerate import cpu_offload

    from flare.evaluation.scoring.batches import Engine
    from flare.evaluation.scoring.generation import generation_samples
    from flare.evaluation.scoring.perplexity import score_documents
    from flare.evaluation.scoring.scorer import TokenScorer
    from flare.nope.probe import input_device, probe_nope_layers

    tokenizer, plain, spread = bpe_tokenizer(), tiny(), tiny()
    cpu_offload(spread, execution_device="cpu")
    assert spread.lm_head.weight.device.type == "meta" and input_device(spread).type == "cpu"
    assert TokenScorer(spread, "cpu", [1, 2, 3]).fused
    settings = {"max_length": 32, "batch_size": 2, "device": input_device(spread)}
    ours, theirs = (score_documents(m, tokenizer, TEXTS, **settings) for m in (spread, plain))
    np.testing.assert_allclose(ours.document_nll, theirs.document_nll, rtol=RELATIVE)
    assert probe_nope_layers(spread) == []
    assert generation_samples(spread, tokenizer, 5) == generation_samples(plain, tokenizer, 5)
    assert Engine(TokenScorer(spread, "cpu", [1]), 8).world.size == 1


@pytest.mark.slow
def test_device_auto_scores_the_same_as_cpu(base_model: Path, documents: Path, tmp_path: Path):
    flags = ["--model_path", base_model, "--datasets", documents, "--max_length", 64]
    auto = evaluate(tmp_path / "auto", *flags, "--device", "auto", "--precision", "fp32")
    same(auto["datasets"], evaluate(tmp_path / "cpu", *flags, "--device", "cpu")["datasets"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stride", "65", "--max_length", "64"], "--stride 65 is more than --max_length 64"),
        (["--context_lengths", "512,x"], "--context_lengths must be token counts"),
        (["--device", "cuda:1", "--gpu_ids", "0"], "both choose GPUs"),
        (["--device", "auto", "--nproc_per_node", "2"], "for one process"),
        (["--device", "cuda"], "sees no GPU"),
        pytest.param(  # lm-eval reads all its tasks to know
            ["--lm_eval_tasks", "no_such_task_of_anyone"],
            "no such task: no_such_task_of_anyone",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_wrong_flags_end_with_one_line(
    base_model: Path, documents: Path, tmp_path: Path, flags: list[str], words: str
):
    result = run_script(
        "evaluate_model_enhanced.py",
        "--model_path",
        base_model,
        "--datasets",
        documents,
        "--output_dir",
        tmp_path,
        *flags,
    )
    assert result.returncode == 2, result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "evaluation_results.json").exists()

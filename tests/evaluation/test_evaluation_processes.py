"""Evaluations as users run them: several processes, killed and run again, sets from a mirror, lm-eval's tasks."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flare.evaluation.datasets import load_texts, parse_name
from flare.evaluation.finished import FinishedParts, model_identity, texts_identity
from tests.conftest import write_base, write_corpus
from tests.evaluation.models import PROSE, bpe_tokenizer, tiny
from tests.processes import REPO, run_script, script_environment

RELATIVE = 1e-6
TEXTS = [PROSE * n for n in (3, 1, 2, 5)]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("processes") / "base")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("processes") / "docs.jsonl", 25)


def evaluate(output: Path, *flags: object) -> dict:
    result = run_script("evaluate_model_enhanced.py", "--output_dir", output, "--generate_tokens", 0, *flags)
    assert result.returncode == 0, result.stderr
    return json.loads((output / "evaluation_results.json").read_text())


def same(one: object, other: object) -> None:
    """Equal, floats to 1e-6 (counts exactly)."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b)
    elif isinstance(one, float):
        assert other == pytest.approx(one, rel=RELATIVE)
    else:
        assert other == one


def test_one_and_two_processes_and_batch_one_and_eight_agree(base_model: Path, documents: Path, tmp_path: Path):
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
    """The other metrics, on a model with NoPE layers (the probe) beside its base."""
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
def test_several_processes_tell_an_error_once(base_model: Path, tmp_path: Path):
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--datasets", "/nowhere.jsonl",
        "--output_dir", tmp_path, "--gpu_type", "cpu", "--nproc_per_node", 2,
    )  # fmt: skip
    assert result.returncode == 3
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr


def test_a_killed_evaluation_goes_on_where_it_was(base_model: Path, documents: Path, tmp_path: Path):
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


def test_a_part_is_found_by_what_its_numbers_depend_on_only(tmp_path: Path):
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


def test_a_model_spread_by_accelerate_scores_the_same(tmp_path: Path):
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
def test_device_auto_is_accelerates_device_map(base_model: Path, documents: Path, tmp_path: Path):
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
def test_mistakes_end_in_one_line(base_model: Path, documents: Path, tmp_path: Path, flags: list[str], words: str):
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


# -- data sets as the hub has them ----------------------------------------------------------------------


def write_parquet(path: Path, **columns: list) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def gpu(directory: Path, config: str, split: str, path: str) -> None:
    """A data set card, which says where configurations have their files."""
    lines = [
        "---",
        "configs:",
        f"- config_name: {config}",
        "  data_files:",
        f"  - split: {split}",
        f"    path: {path}",
        "---",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n")


WIKI = ["", " = One = \n", "", " First text . \n", " = = Part = = \n", " More . \n", " = Two = \n", " Second . \n"]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets with the hub's names, layout and columns."""
    root = tmp_path_factory.mktemp("mirror")
    write_parquet(root / "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet", text=WIKI)
    gpu(root / "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "wikitext-2-raw-v1/test-*")
    c4 = root / "allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    c4.parent.mkdir(parents=True)
    with gzip.open(c4, "wt", encoding="utf-8") as file:
        for text in TEXTS:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x"}) + "\n")
    gpu(root / "allenai/c4", "en", "validation", "en/c4-validation.*.json.gz")
    words = [f"{PROSE.strip()} and so it ended", "nobody knew the end"]
    write_parquet(root / "EleutherAI/lambada_openai/default/test-00000-of-00001.parquet", text=words)
    gpu(root / "EleutherAI/lambada_openai", "default", "test", "default/test-*")
    books = {"short_book_title": ["A", "B"], "publication_date": [1900, 1910], "url": ["u", "v"], "text": TEXTS[:2]}
    write_parquet(root / "emozilla/pg19-test/data/test-00000-of-00001-abc.parquet", **books)
    return root


def test_the_known_sets_are_read_as_the_hub_lays_them_out(mirror: Path, tmp_path: Path):
    def texts(name: str, limit: int | None = None) -> list[str]:
        return load_texts(parse_name(name, str(tmp_path)), limit, str(mirror))

    assert texts("wikitext2") == ["".join(WIKI[:6]), "".join(WIKI[6:])]
    assert texts("c4") == TEXTS and texts("c4", 2) == TEXTS[:2]
    assert texts("pg19") == TEXTS[:2]
    assert len(texts("lambada")) == 2 and parse_name("lambada", None).is_lambada


def test_default_data_sets_from_a_mirror_one_of_them_not_there(base_model: Path, mirror: Path, tmp_path: Path):
    """Offline: what the mirror lacks is asked of the hub, fails, and leaves the others standing."""
    (mirror / "EleutherAI").rename(mirror / "away")
    try:
        result = run_script(
            "evaluate_model_enhanced.py", "--model_path", base_model, "--use_default_datasets",
            "--data_mirror", mirror, "--cache_dir", tmp_path / "cache",
            "--output_dir", tmp_path / "out", "--device", "cpu", "--max_length", 64,
            "--min_tokens", 40, "--generate_tokens", 0,
        )  # fmt: skip
    finally:
        (mirror / "away").rename(mirror / "EleutherAI")
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "wikitext2": "ok", "c4": "ok", "lambada": "failed", "pg19": "ok",
    }  # fmt: skip
    assert "lambada" in entries["lambada"]["error"]
    assert "Not scored" in (tmp_path / "out" / "evaluation_report.md").read_text()


def test_an_empty_set_is_an_error_and_never_nan(base_model: Path, documents: Path, tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text('{"text": "  "}\n')
    (tmp_path / "small.jsonl").write_text('{"text": "a few words"}\n')
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--device", "cpu", "--output_dir", tmp_path / "out",
        "--datasets", tmp_path / "empty.jsonl", tmp_path / "small.jsonl", documents, "--min_tokens", 100,
    )  # fmt: skip
    assert result.returncode == 3
    text = (tmp_path / "out" / "evaluation_results.json").read_text()
    entries = list(json.loads(text)["datasets"].values())
    assert sorted(entry["status"] for entry in entries) == ["failed", "failed", "ok"]
    assert "NaN" not in text and "holds no document" in text and "at least 100 are needed" in text


# -- lm-eval --------------------------------------------------------------------------------------------


TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {kind}
test_split: test
{rest}
"""
ENDS = {
    "doc_to_text": "\"{{text.split(' ')[:-1]|join(' ')}}\"",
    "doc_to_target": "\"{{' '+text.split(' ')[-1]}}\"",
}
KINDS = {
    "loglikelihood": ENDS | {"metric_list": "[{metric: perplexity, aggregation: perplexity}, {metric: acc}]"},
    "multiple_choice": {
        "doc_to_text": ENDS["doc_to_text"], "doc_to_choice": "[one, two, three]", "doc_to_target": 1,
        "metric_list": "[{metric: acc}, {metric: acc_norm}]",
    },
    "loglikelihood_rolling": {
        "doc_to_text": '""', "doc_to_target": '"{{text}}"',
        "metric_list": "[{metric: bits_per_byte}, {metric: word_perplexity}]",
    },
    "generate_until": ENDS | {
        "generation_kwargs": "{until: ['.'], max_gen_toks: 6}", "metric_list": "[{metric: exact_match}]",
    },
}  # fmt: skip


def write_task(kind: str, data: Path, directory: Path) -> Path:
    """A task of lm-eval's as a file."""
    rest = "\n".join(f"{key}: {value}" for key, value in KINDS[kind].items())
    file = directory / f"{kind}.yaml"
    file.write_text(TASK.format(name=f"local_{kind}", data=data, kind=kind, rest=rest))
    return file


@pytest.fixture
def last_words(tmp_path: Path) -> Path:
    """Documents whose last word is asked for; lm-eval is there."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "words.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{PROSE.strip()} {word}"}) + "\n" for word in ("one", "two", "three", "four"))
    )
    return data


def test_lm_evals_tasks_run_on_our_model_and_land_in_results_and_report(
    base_model: Path, last_words: Path, tmp_path: Path
):
    results = evaluate(
        tmp_path / "out", "--model_path", base_model, "--datasets", f"lambada={last_words}", "--device", "cpu",
        "--lm_eval_tasks", write_task("loglikelihood", last_words, tmp_path), "--lm_eval_limit", 3,
        "--max_samples_per_dataset", 3,
    )  # fmt: skip
    theirs = results["lm_eval"]["tasks"]["local_loglikelihood"]
    ours = results["datasets"]["lambada"]
    # exp() of some 27 nats a word multiplies the relative error of their mean: the exponents are compared.
    assert math.log(theirs["perplexity,none"]) == pytest.approx(math.log(ours["lambada_perplexity"]), rel=RELATIVE)
    assert 100 * theirs["acc,none"] == ours["lambada_accuracy"]
    assert results["lm_eval"]["num_samples"] == {"local_loglikelihood": 3}
    assert "| local_loglikelihood | perplexity |" in (tmp_path / "out" / "evaluation_report.md").read_text()


@pytest.mark.slow
def test_lm_evals_tasks_give_the_same_on_two_processes(base_model: Path, last_words: Path, tmp_path: Path):
    """All kinds of requests; the one that a single document makes leaves a process without work."""
    tasks = ",".join(str(write_task(kind, last_words, tmp_path)) for kind in KINDS)
    flags = ["--model_path", base_model, "--datasets", last_words, "--max_length", 64, "--lm_eval_tasks", tasks]
    one = evaluate(tmp_path / "one", *flags, "--device", "cpu", "--batch_size", 1)["lm_eval"]
    two = evaluate(tmp_path / "two", *flags, "--gpu_type", "cpu", "--nproc_per_node", 2)["lm_eval"]
    same(one, two)
    assert set(one["num_samples"].values()) == {4} and len(one["tasks"]) == len(KINDS)
    first = [*flags, "--lm_eval_limit", 1, "--gpu_type", "cpu", "--nproc_per_node", 2]
    assert set(evaluate(tmp_path / "first", *first)["lm_eval"]["num_samples"].values()) == {1}


@pytest.mark.slow
def test_a_task_of_lm_evals_that_fails_leaves_the_rest_standing(base_model: Path, last_words: Path, tmp_path: Path):
    """Its data is gone: rank 0 finds out while the other waits for requests."""
    task = write_task("loglikelihood", tmp_path / "gone.jsonl", tmp_path)
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--datasets", last_words, "--lm_eval_tasks", task,
        "--output_dir", tmp_path / "out", "--gpu_type", "cpu", "--nproc_per_node", 2,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert entries[str(last_words)]["status"] == "ok"
    assert "gone.jsonl" in entries["--lm_eval_tasks"]["error"]


def test_requests_with_one_context_stay_together():
    from flare.evaluation.lm_eval_ranks import deal

    contexts = ["a", "a", "b", "c", "c", "c", "a"]
    assert deal([(context, str(i)) for i, context in enumerate(contexts)], 2) == [[0, 1, 3, 4, 5], [2, 6]]
    assert deal([("a",)], 3) == [[0], [], []]

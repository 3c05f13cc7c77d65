"""lm-eval's tasks on the evaluated model, in one process and in two."""

import json
import math
from pathlib import Path

import pytest

from tests.evaluation.models import PROSE
from tests.evaluation.processes import RELATIVE, evaluate, same
from tests.processes import run_script

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
    """Documents for a task that predicts the last word; needs lm-eval."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "words.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"{PROSE.strip()} {word}"}) + "\n" for word in ("one", "two", "three", "four"))
    )
    return data


@pytest.mark.slow
def test_lm_eval_tasks_appear_in_results_and_report(base_model: Path, last_words: Path, tmp_path: Path):
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
def test_lm_eval_tasks_agree_on_two_processes(base_model: Path, last_words: Path, tmp_path: Path):
    """All kinds of requests; a single document makes one request, so one process has no work."""
    tasks = ",".join(str(write_task(kind, last_words, tmp_path)) for kind in KINDS)
    flags = ["--model_path", base_model, "--datasets", last_words, "--max_length", 64, "--lm_eval_tasks", tasks]
    one = evaluate(tmp_path / "one", *flags, "--device", "cpu", "--batch_size", 1)["lm_eval"]
    two = evaluate(tmp_path / "two", *flags, "--gpu_type", "cpu", "--nproc_per_node", 2)["lm_eval"]
    same(one, two)
    assert set(one["num_samples"].values()) == {4} and len(one["tasks"]) == len(KINDS)
    first = [*flags, "--lm_eval_limit", 1, "--gpu_type", "cpu", "--nproc_per_node", 2]
    assert set(evaluate(tmp_path / "first", *first)["lm_eval"]["num_samples"].values()) == {1}


@pytest.mark.slow
def test_failed_lm_eval_task_does_not_stop_the_evaluation(base_model: Path, last_words: Path, tmp_path: Path):
    """The data of the task was deleted: rank 0 fails while the other rank waits for requests."""
    task = write_task("loglikelihood", tmp_path / "gone.jsonl", tmp_path)
    result = run_script(
        "evaluate_model_enhanced.py", "--model_path", base_model, "--datasets", last_words, "--lm_eval_tasks", task,
        "--output_dir", tmp_path / "out", "--gpu_type", "cpu", "--nproc_per_node", 2,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert entries[str(last_words)]["status"] == "ok"
    assert "gone.jsonl" in entries["--lm_eval_tasks"]["error"]


def test_requests_with_the_same_context_go_to_the_same_rank():
    from flare.evaluation.lm_eval_ranks import distribute

    contexts = ["a", "a", "b", "c", "c", "c", "a"]
    assert distribute([(context, str(i)) for i, context in enumerate(contexts)], 2) == [[0, 1, 3, 4, 5], [2, 6]]
    assert distribute([("a",)], 3) == [[0], [], []]

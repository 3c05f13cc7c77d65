"""evaluate_model_enhanced.py as a user runs it: comparisons, other model families, and errors."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_base, write_corpus
from tests.evaluation.models import PROSE, bpe_tokenizer, tiny, write_rows
from tests.processes import run_script


def evaluate(*flags: object):
    return run_script("evaluate_model_enhanced.py", "--device", "cpu", *flags)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, its patched copy, and a small corpus."""
    root = tmp_path_factory.mktemp("family")
    base = write_base(root / "base")
    result = run_script(
        "patch_qwen_rope.py", "--model_name_or_path", base, "--no_rope_layers", "1-2", "--output_dir", root / "patched"
    )
    assert result.returncode == 0, result.stderr
    return {"base": base, "patched": root / "patched", "corpus": write_corpus(root / "docs.jsonl", 12)}


def test_models_are_compared_on_the_same_documents(family: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate(
        "--model_path", family["patched"], "--compare_to", family["base"], "--datasets", family["corpus"],
        "--max_length", 64, "--batch_size", 4, "--output_dir", tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    assert results["model"]["nope_probe"] == {"verified": True, "layers": [1, 2]}
    assert [m["label"] for m in results["milestones"]] == ["base", "patched, untrained"]
    (entry,) = results["datasets"].values()
    assert (entry["status"], entry["num_documents"]) == ("ok", 12)
    report = (tmp_path / "evaluation_report.md").read_text()
    assert "**Verdict:**" in report.splitlines()[1]
    assert list((tmp_path / "plots").glob("loss_by_position*.png"))
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_any_causal_lm_can_be_evaluated(family: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(family["base"]).save_pretrained(tmp_path / "llama")
    result = evaluate("--model_path", tmp_path / "llama", "--datasets", family["corpus"], "--output_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "evaluation_results.json").read_text())
    (entry,) = results["datasets"].values()
    assert entry["perplexity"] == pytest.approx(304, rel=1e-6)  # a zeroed head knows nothing


def test_failed_data_set_does_not_stop_the_others(family: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate(
        "--model_path", family["base"], "--datasets", "/nowhere/x.jsonl", family["corpus"], "--output_dir", tmp_path
    )
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "evaluation_results.json").read_text())["datasets"]
    assert sorted(entry["status"] for entry in entries.values()) == ["failed", "ok"]
    assert entries["/nowhere/x.jsonl"]["error"].startswith("--datasets /nowhere/x.jsonl: no such file")


@pytest.mark.slow
def test_data_set_that_fails_for_a_compared_model_only_is_reported_with_its_label(
    family: dict[str, Path], tmp_path: Path
) -> None:
    """The compared model's embedding has fewer rows than its tokenizer has tokens."""
    import shutil

    from transformers import AutoModelForCausalLM

    shutil.copytree(family["base"], tmp_path / "small")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    model.resize_token_embeddings(model.config.vocab_size // 4)
    model.save_pretrained(tmp_path / "small")
    corpus = family["corpus"]
    result = evaluate(
        "--model_path", family["patched"], "--compare_to", tmp_path / "small", "--datasets", corpus,
        "--max_length", 64, "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    results = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    assert results["datasets"][str(corpus)]["status"] == "ok"
    (error,) = results["not_compared"].values()
    assert error.startswith("base: ")
    assert f"- {corpus}: base: " in (tmp_path / "out" / "evaluation_report.md").read_text()


def test_unwritable_output_dir_is_an_error_before_anything_is_measured(
    family: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    flags = ("--model_path", family["base"], "--datasets", family["corpus"])
    result = evaluate(*flags, "--output_dir", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: --output_dir {tmp_path}/file/out: ")
    assert "perplexity" not in result.stderr


@pytest.mark.slow
def test_known_data_set_given_as_two_files_is_an_error(family: dict[str, Path], tmp_path: Path) -> None:
    corpus, other = family["corpus"], write_corpus(tmp_path / "other.jsonl", 3)
    words = (f"wikitext2={corpus}", f"wikitext2={other}")
    result = evaluate("--model_path", family["base"], "--datasets", *words, "--output_dir", tmp_path / "out")
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert entries["wikitext2"]["status"] == "ok"
    assert "wikitext2 is given twice" in entries[words[1]]["error"]


def test_edited_nope_layers_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """The model's own class opened with another list of layers than it was patched with is another model; a
    config without NoPE layers is not a NoPE model."""
    import shutil

    shutil.copytree(family["patched"], tmp_path / "lie")
    config = json.loads((tmp_path / "lie" / "config.json").read_text())
    (tmp_path / "lie" / "config.json").write_text(json.dumps(config | {"nope_layers": []}))
    result = evaluate("--model_path", tmp_path / "lie", "--datasets", family["corpus"], "--output_dir", tmp_path)
    assert result.returncode == 2
    assert "nope_layers names no layer; edited?" in result.stderr


@pytest.mark.slow
def test_compared_model_scores_the_same_as_when_evaluated_alone(family: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit, whatever was loaded before: layers with and without RoPE, another family, another tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.evaluation.models import PROSE, bpe_tokenizer

    shape = {"vocab_size": 330, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=4))
    llama.save_pretrained(tmp_path / "llama")
    bpe_tokenizer().save_pretrained(tmp_path / "llama")
    models = {
        "patched, untrained": family["patched"],
        "base (base)": family["base"],
        "base (llama)": tmp_path / "llama",
    }
    corpus = tmp_path / "docs.jsonl"
    corpus.write_text("".join(json.dumps({"text": PROSE * n}) + "\n" for n in (40, 3, 60)))
    measures = [
        "--datasets", corpus, "--max_length", 64, "--context_lengths", "64,768", "--passkey",
        "--passkey_samples", 1, "--generate_tokens", 3,
    ]  # fmt: skip

    def results(name: str, first: Path, *others: Path) -> dict:
        compared = ["--compare_to", *others] if others else []
        result = evaluate("--model_path", first, *compared, *measures, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr
        return json.loads((tmp_path / name / "evaluation_results.json").read_text())

    alone = {label: results(label, model) for label, model in models.items()}
    for label, *others in (list(models), list(models)[::-1]):
        together = results(f"{label} first", models[label], *(models[other] for other in others))
        for key in ("model", "datasets", "context_lengths", "passkey", "samples"):
            assert together[key] == alone[label][key]
        for record in together["milestones"]:
            expected = alone[record["label"]]
            for name, numbers in record["datasets"].items():
                assert numbers.items() <= expected["datasets"][name].items()
            for key in ("context_lengths", "passkey"):
                assert record[key] == expected[key]


@pytest.mark.slow
def test_failed_context_lengths_and_passkey_are_reported(tmp_path: Path) -> None:
    """A model with a table of positions, evaluated on longer contexts."""
    model = tmp_path / "gpt2"
    tiny("gpt2", n_positions=64, max_position_embeddings=64).save_pretrained(model)
    bpe_tokenizer().save_pretrained(model)
    long = write_rows(tmp_path / "long.jsonl", PROSE * 60, PROSE)
    result = evaluate(
        "--model_path", model, "--datasets", long, "--output_dir", tmp_path, "--max_length", 64,
        "--generate_tokens", 0, "--context_lengths", "16,2000", "--passkey", "--passkey_samples", 1,
    )  # fmt: skip
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "evaluation_results.json").read_text())["datasets"]
    assert entries.pop(str(long))["status"] == "ok"
    assert list(entries) == ["--context_lengths", "--passkey"]
    assert all(entry["status"] == "failed" for entry in entries.values())
    assert "learned positions for 64 only" in entries["--context_lengths"]["error"]
    assert "learned positions for 64 only" in entries["--passkey"]["error"]
    assert "Not scored" in (tmp_path / "evaluation_report.md").read_text()

"""evaluate_model_enhanced.py as a user runs it."""

import json
import re
from pathlib import Path

import pytest

from flare.data.sources.base import SourceSpec
from flare.errors import ConfigError, DataError
from flare.evaluation.datasets import held_out, join_pages, load_texts, parse_name
from flare.evaluation.models import milestones
from flare.evaluation.options import resolve_settings
from flare.evaluation.report.fair_control import differences, same_training, training_of
from tests.conftest import write_base, write_corpus
from tests.evaluation.models import PROSE, bpe_tokenizer, tiny
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


def test_a_set_that_cannot_be_had_leaves_the_others_standing(family: dict[str, Path], tmp_path: Path) -> None:
    result = evaluate(
        "--model_path", family["base"], "--datasets", "/nowhere/x.jsonl", family["corpus"], "--output_dir", tmp_path
    )
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "evaluation_results.json").read_text())["datasets"]
    assert sorted(entry["status"] for entry in entries.values()) == ["failed", "ok"]
    assert entries["/nowhere/x.jsonl"]["error"].startswith("--datasets /nowhere/x.jsonl: no such file")


@pytest.mark.slow
def test_a_set_that_only_the_compared_model_cannot_take_is_named_with_that_model(
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


def test_mistakes_are_told_before_anything_is_measured(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ("--model_path", family["base"], "--datasets", family["corpus"])
    result = evaluate(*flags, "--output_dir", tmp_path / "file" / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: --output_dir {tmp_path}/file/out: ")
    assert "perplexity" not in result.stderr


@pytest.mark.slow
def test_a_known_set_given_as_two_files_is_not_scored_as_one(family: dict[str, Path], tmp_path: Path) -> None:
    corpus, other = family["corpus"], write_corpus(tmp_path / "other.jsonl", 3)
    words = (f"wikitext2={corpus}", f"wikitext2={other}")
    result = evaluate("--model_path", family["base"], "--datasets", *words, "--output_dir", tmp_path / "out")
    assert result.returncode == 3, result.stderr
    entries = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())["datasets"]
    assert entries["wikitext2"]["status"] == "ok"
    assert "wikitext2 is given twice" in entries[words[1]]["error"]


def test_a_config_that_lies_about_its_layers_is_refused(family: dict[str, Path], tmp_path: Path) -> None:
    """The model's own class opened with another list of layers than it was patched with is another model; a
    config that names none is no NoPE model at all."""
    import shutil

    shutil.copytree(family["patched"], tmp_path / "lie")
    config = json.loads((tmp_path / "lie" / "config.json").read_text())
    (tmp_path / "lie" / "config.json").write_text(json.dumps(config | {"nope_layers": []}))
    result = evaluate("--model_path", tmp_path / "lie", "--datasets", family["corpus"], "--output_dir", tmp_path)
    assert result.returncode == 2
    assert "nope_layers names no layer; edited?" in result.stderr


def test_a_control_is_told_from_a_base_by_the_stage_it_went_through(tmp_path: Path) -> None:
    """Also where stage 1's model was set aside, one directory deeper."""
    for root, stages in (("base", {"2": {}}), ("control", {"1": {}, "2": {}})):
        for stage, directory in ((1, "stage1/final_model"), (2, "final_model")):
            (tmp_path / root / directory).mkdir(parents=True)
            config = {"model_type": "qwen2", "num_hidden_layers": 4, "flare": {"stage": stage}}
            (tmp_path / root / directory / "config.json").write_text(json.dumps(config))
        (tmp_path / root / "training_metrics.json").write_text(json.dumps({"stages": stages}))
    models = ("base/final_model", "control/stage1/final_model", "control/final_model")
    found = milestones([tmp_path / model for model in models])
    assert [m.label for m in found] == ["base", "control (stage 1)", "control (stage 2)"]
    assert [m.training for m in found] == [{}, {"stages": [1]}, {"stages": [1, 2]}]


def test_stages_are_those_of_the_guides_two_experiments_too(tmp_path: Path) -> None:
    """NAME_stage2 that started from NAME_stage1: a control there is no base. A model moved away has no record."""
    for kind, nope_layers in (("control", []), ("mine", [1])):
        for stage in (1, 2):
            root = tmp_path / f"{kind}_stage{stage}"
            (root / "final_model").mkdir(parents=True)
            config = {"model_type": "qwen2", "num_hidden_layers": 4, "flare": {"stage": stage}}
            config |= {"nope_layers": nope_layers, "model_type": "qwen2_nope"} if nope_layers else {}
            (root / "final_model" / "config.json").write_text(json.dumps(config))
            start = tmp_path / (f"{kind}_stage1" if stage == 2 else "base") / "final_model"
            block = {"status": "finished", "starts_from": str(start)}
            metrics = {"current_stage": stage, "stages": {str(stage): block}}
            (root / "training_metrics.json").write_text(json.dumps(metrics))
    names = ("control_stage1", "control_stage2", "mine_stage2")
    found = milestones([tmp_path / name / "final_model" for name in names])
    assert [m.label for m in found] == ["control (stage 1)", "control (stage 2)", "stage 2"]
    assert [m.training["stages"] for m in found] == [[1], [1, 2], [1, 2]]
    other_start = {"current_stage": 2, "stages": {"2": {"status": "finished", "starts_from": str(tmp_path / "base")}}}
    (tmp_path / "mine_stage2" / "training_metrics.json").write_text(json.dumps(other_start))
    assert milestones([tmp_path / "mine_stage2" / "final_model"])[0].training == {"stages": [2]}
    (tmp_path / "mine_stage2" / "final_model").rename(tmp_path / "moved")
    assert milestones([tmp_path / "moved"])[0].training is None


def test_a_fair_control_had_the_same_training_but_for_rope() -> None:
    """By training_metrics.json: data, length, schedule, steps; not how the work was shared, nor the NoPE layers."""

    def block(**other: object) -> dict:
        identity = {"data": "5f", "max_seq_length": 4096, "packing": "document", "train_layers": "layers 20-32"}
        settings = {"learning_rate": 1e-4, "warmup_steps": 10, "per_device_train_batch_size": 3, "gpu_type": "A800"}
        facts = {"identity": identity, "settings": settings, "totals": {"steps": 1000, "tokens": 49_152_000}}
        return {name: fact | other.get(name, {}) for name, fact in facts.items()}

    mine = training_of({"1": block(), "2": block()}, 2)
    same = block(settings={"gpu_type": "A40", "per_device_train_batch_size": 1, "no_rope_layers": ["none"]})
    assert same_training(training_of({"1": same, "2": same}, 2), mine)
    assert same_training(
        training_of({"1": block(), "2": block(settings={"learning_rate": 1.0})}, 1), training_of({"1": block()}, 1)
    )
    for other, words in (
        (block(settings={"learning_rate": 3e-5}), "learning_rate of stage 2 3e-05 instead of 0.0001"),
        (block(totals={"tokens": 40_000_000}), "tokens of stage 2 40,000,000 instead of 49,152,000"),
        (block(identity={"data": "a1"}), "other data of stage 2"),
    ):
        control = training_of({"1": block(), "2": other}, 2)
        assert not same_training(control, mine) and differences(control, mine) == [words]
    assert same_training({"stages": [1, 2]}, mine)  # an experiment of before recorded less
    assert not same_training(None, mine) and not same_training({}, {})


def test_models_that_are_alike_are_called_by_what_their_paths_differ_in(tmp_path: Path) -> None:
    """Two experiments of one name in two places, a model of the hub in its cache; one model twice is a mistake."""
    places = ("a/mine/final_model", "b/mine/final_model", "b/other/final_model", "hub/snapshots/1d2e")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 4}')
    directories = [tmp_path / place for place in places]
    found = milestones(directories, [*map(str, directories[:3]), "Qwen/Qwen2.5-3B"])
    assert [m.label for m in found] == ["base (a/mine)", "base (b/mine)", "base (other)", "base (Qwen2.5-3B)"]
    (tmp_path / "link").symlink_to(directories[0])
    with pytest.raises(ConfigError, match=r"link: the same model is given twice"):
        milestones([directories[0], tmp_path / "link"])


@pytest.mark.slow
def test_a_compared_model_has_the_numbers_that_it_has_alone(family: dict[str, Path], tmp_path: Path) -> None:
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


def test_wikitext_lines_are_joined_to_pages() -> None:
    first = [" = First = \n", " \n", " text . \n", " = = Section = = \n", " more . \n"]
    lines = [" \n", *first, " = Second = \n", " x \n"]
    pages = list(join_pages(iter(lines)))
    assert pages == ["".join(lines[1:6]), "".join(lines[6:])]


def write_rows(file: Path, *values: object) -> Path:
    file.write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    return file


def test_rows_without_text_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A null row of WikiText is no line "None"; a blank one is part of its page."""
    page = [" = One = \n", " \n", " text . \n"]
    wiki = write_rows(tmp_path / "wiki.jsonl", *page[:2], None, page[2], 7, " = Two = \n", " \ud800 \n", " y \n")
    passages = write_rows(tmp_path / "words.jsonl", "a passage and its end", "word", "ends in a space ", None)
    with caplog.at_level("WARNING", logger="flare"):
        assert load_texts(parse_name(f"wikitext2={wiki}", None), None) == ["".join(page), " = Two = \n y \n"]
        assert load_texts(parse_name(f"lambada={passages}", None), None) == ["a passage and its end"]
    told = caplog.text.replace(f"{tmp_path}/", "")
    assert (
        "wikitext2: left out 3 rows without usable text (wiki.jsonl:3 is null; wiki.jsonl:5 is int, not text" in told
    )
    assert "lambada: left out 3 rows without usable text (words.jsonl:2 has no last word" in told
    nothing = write_rows(tmp_path / "nothing.jsonl", "没有空格")
    with pytest.raises(DataError, match="holds no document, 1 rows without usable text"):
        load_texts(parse_name(f"lambada={nothing}", None), None)


def test_wikitext_as_one_file_of_lines_gives_its_pages(tmp_path: Path) -> None:
    pages = [" = One = \n \n text \u2028 . \n", " = Two = \n x . \n"]
    (tmp_path / "wiki.txt").write_text(" \n" + "".join(pages), encoding="utf-8")
    assert load_texts(parse_name(f"wikitext2={tmp_path}/wiki.txt", None), None) == pages


def test_a_local_copy_stands_for_the_default_set_of_its_name() -> None:
    flags = ["--model_path", "m", "--output_dir", "o", "--use_default_datasets", "--datasets", "lambada=x.jsonl"]
    assert resolve_settings(flags).datasets == ("wikitext2", "c4", "pg19", "lambada=x.jsonl")


def test_what_fails_beside_the_data_sets_is_told_and_costs_no_report(tmp_path: Path) -> None:
    """A model with a table of positions, asked for longer contexts."""
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


def test_hub_names_carry_config_split_and_column() -> None:
    spec = parse_name("owner/set:en:validation:body", None).spec
    assert (spec.dataset_name, spec.dataset_config, spec.dataset_split, spec.text_column) == (
        "owner/set", "en", "validation", "body",
    )  # fmt: skip
    for local in ("corpus/*.txt", "corpus/x.jsonl.gz", "a[bc].csv"):
        assert parse_name(local, None).spec == SourceSpec(local)
    with pytest.raises(ConfigError, match="known sets: wikitext2"):
        parse_name("wikitext3", None)
    for word, words in (("lambada=", "give a file after the ="), ("a/b:c:d:e:f", "more parts than")):
        with pytest.raises(ConfigError, match=words):
            parse_name(word, None)


def test_errors_name_what_evaluation_was_given(tmp_path: Path) -> None:
    """Training's options for a data set and its column do not exist here."""
    (tmp_path / "body.jsonl").write_text('{"body": "one"}\n')
    (tmp_path / "notes.md").write_text("no data")
    for name, words in (
        ("body.jsonl", "columns: body; of a file it must be that one, of a hub set owner/name:config:split:COLUMN"),
        ("notes.md", f"--datasets {tmp_path}/notes.md: cannot read 'notes.md'"),
        ("*.csv", f"--datasets {tmp_path}/*.csv: matches no file"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)) as raised:
            load_texts(parse_name(str(tmp_path / name), None), None)
        assert "--dataset_name" not in str(raised.value)
        assert "--text_column" not in str(raised.value)


def test_rows_without_text_are_left_out_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("flare.evaluation.datasets.log.warning", told.append)
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": null}\n{"text": "one"}\n{"text": "\xff"}\n')
    left_out = f"2 rows without usable text ({file}:1 is null; {file}:3 is not UTF-8 (byte 10))"
    assert load_texts(parse_name(str(file), None), None) == ["one"]
    assert told == [f"data set {file}: left out {left_out}"]
    file.write_bytes(b'{"text": null}\n')
    with pytest.raises(DataError, match=re.escape(f"holds no document, 1 rows without usable text ({file}:1 is")):
        load_texts(parse_name(str(file), None), None)


def test_embedded_evaluation_uses_only_documents_that_the_demo_held_out(tmp_path: Path) -> None:
    import numpy as np

    from flare.data.packing import split_documents
    from flare.data.sources.documents import text_hash
    from flare.data.sources.embedded import embedded_documents

    texts = [text for _, text in embedded_documents(tmp_path)]
    train, _ = split_documents(np.array([text_hash(t) for t in texts], dtype=np.uint64), 5)
    assert not {texts[i] for i in train} & set(held_out(texts))

"""evaluation_results.json: written atomically, finite numbers only, with a verified model record."""

import json
import math

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from flare.errors import DataError, FlareError
from flare.evaluation import results as results_module
from tests.evaluation.models import PROSE, score, tiny


def test_results_of_several_data_sets_are_written_and_read_back(model, tokenizer, tmp_path):
    record = results_module.model_record(model, tokenizer, "some/model", probed_layers=[])
    results = results_module.new_results(record, {"protocol": "document"}, {"torch": torch.__version__})
    scored = score(model, tokenizer, [PROSE] * 5)
    path = tmp_path / "evaluation" / "evaluation_results.json"
    results_module.add_dataset(results, "first", scored)
    results_module.write_results(results, path)
    assert list(json.loads(path.read_text())["datasets"]) == ["first"]
    results_module.add_failure(results, "second", DataError("no such file"))
    results_module.add_throughput(results, [scored], "cpu")
    results_module.write_results(results, path)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read["schema_version"] == 1
    assert read["datasets"]["first"]["perplexity"] == scored.perplexity
    assert read["datasets"]["second"] == {"status": "failed", "error": "no such file"}
    assert read["throughput"]["tokens_per_sec"] == pytest.approx(scored.timed_tokens / scored.timed_sec)
    assert read["throughput"]["peak_memory_bytes"] > 2**20
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_non_finite_number_is_refused_and_the_old_file_is_kept(tmp_path):
    path = tmp_path / "evaluation_results.json"
    path.write_text("before")
    results = results_module.new_results({}, {}, {})
    results["datasets"]["x"] = {"loss_by_position": [{"loss": 1.0}, {"loss": math.nan}]}
    with pytest.raises(FlareError, match=r"datasets\.x\.loss_by_position\.1\.loss"):
        results_module.write_results(results, path)
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_model_record_compares_probe_and_config(tokenizer):
    model = tiny()
    plain = results_module.model_record(model, tokenizer, "p", probed_layers=[])
    assert plain["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert plain["nope_layers"] == [] and plain["nope_probe"] == {"verified": True, "layers": []}
    assert plain["rope_theta"] == model.config.rope_parameters["rope_theta"]
    model.config.nope_layers = [1]
    verified = {
        str(probed): results_module.model_record(model, tokenizer, "p", probed)["nope_probe"]["verified"]
        for probed in ([1], [], None)
    }
    assert verified == {"[1]": True, "[]": False, "None": None}


def test_smollm3_no_rope_layers_zero_means_nope():
    config = transformers.SmolLM3Config(num_hidden_layers=8, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0])
    assert results_module.declared_nope_layers(config) == [3, 7]


def test_tokenizer_hash_depends_on_the_vocabulary_only(tokenizer, bytes_tokenizer, tmp_path):
    before = results_module.tokenizer_sha256(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    loaded.pad_token = loaded.eos_token
    loaded(["a", "longer text"], padding=True)
    assert results_module.tokenizer_sha256(loaded) == before
    assert results_module.tokenizer_sha256(bytes_tokenizer) != before

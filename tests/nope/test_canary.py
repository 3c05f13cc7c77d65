"""The canary: log-probabilities of the saved weights with and without NoPE layers."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flare.errors import CheckpointError
from flare.model.training_model import set_trainable
from flare.nope.canary import measure as canary_module
from flare.nope.canary.file import CANARY_FILE, read_canary
from flare.nope.canary.measure import canary_sequences, check_canary, measure_canary, rope_everywhere, write_canary
from flare.nope.export.export import export_native, restore_rope
from flare.nope.export.verify import verify_directory
from flare.nope.load import load_causal_lm
from flare.nope.patch import patch_qwen_rope
from flare.nope.probe import probe_nope_layers
from flare.plan.trainable import Trainable
from tests.conftest import write_base
from tests.nope.canary_models import LAYERS, SHARP, make_patched
from tests.processes import train


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def patched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched model with its canary."""
    directory = make_patched(tmp_path_factory.mktemp("canary"), request.param)
    write_canary(load_causal_lm(directory), directory)
    return directory


def plain_nll(model: torch.nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    """Per-token NLL from the logits of an ordinary forward pass: none of the canary's own code."""
    tokens = torch.tensor(sequences)
    with torch.no_grad():
        logits = model(tokens).logits.float()
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return nll.view(len(sequences), -1)


def test_numbers_are_those_of_the_model_and_of_the_plain_base(patched: Path) -> None:
    canary = read_canary(patched)
    base = load_causal_lm(patched.with_name(f"{patched.name}-base"))  # RoPE everywhere, as transformers has it
    for model, scores in ((load_causal_lm(patched), canary.true_model), (base, canary.rope_everywhere)):
        torch.testing.assert_close(plain_nll(model, canary.sequences), torch.tensor(scores.nll), rtol=0, atol=1e-5)
        with torch.no_grad():
            logprobs = model(torch.tensor(canary.sequences)).logits.log_softmax(-1)
        for rows, entries in zip(logprobs, scores.top, strict=True):
            values, ids = rows[canary.top_positions].topk(5)
            assert [entry["ids"] for entry in entries] == ids.tolist()
            torch.testing.assert_close(torch.tensor([e["logprobs"] for e in entries]), values, rtol=0, atol=1e-5)
    assert canary.separation_nats > 0.1
    assert canary.nope_layers == LAYERS


def test_model_comes_out_as_it_was(patched: Path) -> None:
    model = load_causal_lm(patched, attn_implementation="eager").train()
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    classes = [type(layer.self_attn) for layer in model.model.layers]
    measure_canary(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        same, pointer, values = before[name]
        assert parameter is same
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)
    assert [type(layer.self_attn) for layer in model.model.layers] == classes
    assert probe_nope_layers(model) == LAYERS
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_model_comes_out_as_it_was_when_the_measurement_fails(patched: Path, monkeypatch) -> None:
    model = load_causal_lm(patched)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    mlp, runs = model.model.layers[2].mlp, itertools.count(1)

    def third_run_fails(hidden: torch.Tensor, original=mlp.forward) -> torch.Tensor:
        if next(runs) == 3:  # after the probe's and the true model's: within a layer, with RoPE put back
            assert all("Nope" not in type(layer.self_attn).__name__ for layer in model.model.layers)
            raise RuntimeError("out of memory")
        return original(hidden)

    monkeypatch.setattr(mlp, "forward", third_run_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_canary(model, torch.bfloat16)
    monkeypatch.undo()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert probe_nope_layers(model) == LAYERS
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_numbers_are_those_of_the_saved_dtype_not_of_the_masters_in_memory(tmp_path: Path) -> None:
    directory = make_patched(tmp_path)
    model = load_causal_lm(directory)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    shutil.copyfile(directory / "config.json", tmp_path / "saved" / "config.json")
    training = load_causal_lm(directory)
    set_trainable(training, Trainable.of(LAYERS), "bf16")  # bf16 and fp32 weights, as on a bf16 run
    write_canary(training, tmp_path / "saved", torch.bfloat16)
    fresh = load_causal_lm(tmp_path / "saved", dtype=torch.float32)
    canary = read_canary(tmp_path / "saved")
    assert canary.facts["weights_dtype"] == "bfloat16"
    torch.testing.assert_close(
        plain_nll(fresh, canary.sequences), torch.tensor(canary.true_model.nll), rtol=0, atol=1e-5
    )
    masters = plain_nll(load_causal_lm(directory), canary.sequences)
    assert (masters - torch.tensor(canary.true_model.nll)).abs().max() > 1e-3  # rounding did matter


def test_one_layer_at_a_time_is_held_twice(patched: Path) -> None:
    model = load_causal_lm(patched, dtype=torch.bfloat16)
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda *_: seen.append(sum(p.dtype == torch.float32 for p in model.parameters())), prepend=True
        )
        for layer in model.model.layers
    ]
    canary_module.score(model, [[1, 2, 3]], [0])
    for hook in hooks:
        hook.remove()
    assert seen == [len(list(layer.parameters())) for layer in model.model.layers]


def test_rope_everywhere_is_proven_by_the_probe(patched: Path) -> None:
    model = load_causal_lm(patched)
    with rope_everywhere(model):
        assert probe_nope_layers(model) == []
    assert probe_nope_layers(model) == LAYERS


def test_plain_models_have_no_canary(base: Path, tmp_path: Path) -> None:
    assert write_canary(load_causal_lm(base), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_sequences_are_fixed_and_free_of_special_tokens(patched: Path) -> None:
    config = load_causal_lm(patched).config
    sequences = canary_sequences(config)
    assert sequences == canary_sequences(config)
    assert [len(tokens) for tokens in sequences] == [64, 64, 64]
    assert all(0 <= token < config.vocab_size // 2 for tokens in sequences for token in tokens)
    assert config.eos_token_id not in {token for tokens in sequences for token in tokens}


def test_a_model_may_have_several_end_tokens(patched: Path) -> None:
    config = load_causal_lm(patched).config
    ordinary = canary_sequences(config)[0][0]
    config.eos_token_id = [config.eos_token_id, ordinary]
    assert ordinary not in {token for tokens in canary_sequences(config) for token in tokens}


def test_verdicts_distinguish_the_cases(patched: Path, tmp_path: Path) -> None:
    family, base = patched.name, patched.with_name(f"{patched.name}-base")
    assert check_canary(load_causal_lm(patched), patched).what == "true model"
    assert check_canary(load_causal_lm(base), patched).what == "RoPE everywhere"
    other = load_causal_lm(write_base(tmp_path / "other", family, seed=7, **SHARP))
    assert check_canary(other, patched).what == "neither"
    halfway = patch_qwen_rope(load_causal_lm(base), LAYERS[:1])
    assert check_canary(halfway, patched).what == "neither"
    small = load_causal_lm(write_base(tmp_path / "small", family, vocab_size=100, bos_token_id=0, eos_token_id=0))
    assert check_canary(small, patched).what == "neither"


def test_weights_a_little_off_are_not_the_true_model(patched: Path) -> None:
    model = load_causal_lm(patched)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.05)
    assert check_canary(model, patched).what == "neither"


def native_model(source: torch.nn.Module, layers: list[int]) -> torch.nn.Module:
    """The same weights in a class of transformers that has NoPE layers itself."""
    from transformers import ExaoneMoeConfig, ExaoneMoeForCausalLM, SmolLM3Config, SmolLM3ForCausalLM

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "max_position_embeddings",
    )  # fmt: skip
    shape = {name: getattr(source.config, name) for name in names}
    if source.config.model_type == "qwen2_nope":
        flags = [int(index not in layers) for index in range(4)]
        native = SmolLM3ForCausalLM(SmolLM3Config(**shape, attention_bias=True, no_rope_layers=flags, pad_token_id=0))
    else:
        kinds = ["full_attention" if index in layers else "sliding_attention" for index in range(4)]
        dense = {"mlp_layer_types": ["dense"] * 4, "head_dim": source.config.head_dim, "layer_types": kinds}
        native = ExaoneMoeForCausalLM(
            ExaoneMoeConfig(**shape, **dense, sliding_window=512, sliding_window_pattern=None)
        )
    missing = native.load_state_dict(source.state_dict(), strict=False).missing_keys
    assert all(name.endswith("o_proj.bias") for name in missing)
    for name in missing:
        torch.nn.init.zeros_(native.get_parameter(name))
    return native.eval()


def test_native_classes_are_checked_with_the_same_file(patched: Path) -> None:
    source = load_causal_lm(patched)
    native = native_model(source, LAYERS)
    native.config.nope_layers = LAYERS
    assert check_canary(native, patched).what == "true model"
    assert check_canary(native_model(source, []), patched).what == "RoPE everywhere"
    with pytest.raises(CheckpointError, match="NoPE layers 1 3 are not of our classes"):
        measure_canary(native)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("true_model"),
        lambda content: content["true_model"]["nll_nats"][0].pop(),
        lambda content: content["rope_everywhere"]["nll_nats"][1].__setitem__(3, None),
        lambda content: content.update(format_version=99),
        lambda content: content.update(sequences=[]),
    ],
)
def test_damaged_files_are_refused(patched: Path, tmp_path: Path, damage) -> None:
    content = json.loads((patched / CANARY_FILE).read_text())
    damage(content)
    (tmp_path / CANARY_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_canary(tmp_path)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no nope_canary\.json"):
        read_canary(tmp_path)
    (tmp_path / CANARY_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_canary(tmp_path)


def test_an_export_takes_the_canary_along_and_passes_it(patched: Path, tmp_path: Path) -> None:
    export_native(patched, tmp_path / "native")
    assert read_canary(tmp_path / "native") == read_canary(patched)
    assert verify_directory(tmp_path / "native")[-1].startswith("nope_canary.json: true model (")
    restore_rope(tmp_path / "native", tmp_path / "plain")
    assert not (tmp_path / "plain" / CANARY_FILE).exists()  # it is another model


def test_an_edited_list_of_layers_is_caught_by_verify(patched: Path, tmp_path: Path) -> None:
    """Another list makes another consistent model: the structural probe does not detect it."""
    shutil.copytree(patched, tmp_path / "copy")
    assert verify_directory(tmp_path / "copy")[-1].startswith("nope_canary.json: true model (")
    config = json.loads((patched / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"nope_layers": [1, 2]}))
    with pytest.raises(CheckpointError, match=r"is not the model of its nope_canary\.json: neither"):
        verify_directory(tmp_path / "copy")


def test_weights_that_are_not_finite_give_no_canary(tmp_path: Path) -> None:
    model = load_causal_lm(make_patched(tmp_path))
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        canary_module.score(model, [[1, 2, 3]], [0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_leaves_a_canary_of_the_final_model(train_flags: list[str], tmp_path: Path, precision: str) -> None:
    base = write_base(tmp_path / "base", **SHARP)
    load_causal_lm(base).to(torch.bfloat16).save_pretrained(base)
    flags = ["--model_name_or_path", base, "--precision", precision, "--max_steps", 2]
    result = train(*train_flags, *flags)
    assert result.returncode == 0, result.stderr
    final = tmp_path / "out" / "run" / "final_model"
    canary = read_canary(final)
    fresh = load_causal_lm(final, dtype=torch.float32)
    assert canary.facts["weights_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    torch.testing.assert_close(
        plain_nll(fresh, canary.sequences), torch.tensor(canary.true_model.nll), rtol=0, atol=1e-5
    )
    assert check_canary(load_causal_lm(final), final).what == "true model"

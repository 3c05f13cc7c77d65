"""Parameter counts by hand and from transformers' models; shapes from config.json."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from flare.errors import ConfigError
from flare.plan.model_shape import KNOWN_SHAPES, ModelShape, known_shape
from flare.plan.trainable import Trainable
from tests.plan.models import CONFIGS, TINY


def config_of(shape: ModelShape) -> Qwen2Config | Qwen3Config:
    sizes = {k: v for k, v in vars(shape).items() if k not in ("family", "name", "attention_bias")}
    if shape.family == "qwen2":
        del sizes["head_dim"]
    else:
        sizes["attention_bias"] = shape.attention_bias
    return CONFIGS[shape.family](**sizes)


def count(module: torch.nn.Module, part: str = "") -> int:
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


def assert_counts(shape: ModelShape) -> None:
    """Every part of the shape against transformers' own model of the config, without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape))
    layer = model.model.layers[0]
    assert shape.attention_params == count(layer, "self_attn.")
    assert shape.attention_matmul_params == count(layer, "proj.weight") - count(layer, "mlp.")
    assert shape.mlp_params == count(layer, "mlp.")
    assert shape.norm_params == count(layer, "layernorm.")
    assert shape.layer_params == count(layer)
    assert shape.embedding_params == count(model.model.embed_tokens)
    assert shape.final_norm_params == count(model.model.norm)
    assert shape.lm_head_params == count(model, "lm_head.")  # a tied weight is listed once, as the embedding
    assert shape.total_params == count(model)


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_known_shapes_count_what_transformers_builds(name: str) -> None:
    assert_counts(KNOWN_SHAPES[name])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_shapes_count_what_transformers_builds(family: str, tied: bool) -> None:
    assert_counts(ModelShape(family, 2, 96, 6, 3, 16, 80, 50, tied))
    if family == "qwen3":
        assert_counts(ModelShape(family, 2, 96, 4, 2, 40, 80, 50, tied, attention_bias=True))


def test_qwen25_half_billion_by_hand() -> None:
    shape = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]
    layer = 896 * (896 + 128 + 128 + 896) + (896 + 128 + 128) + 3 * 896 * 4864 + 2 * 896
    assert shape.total_params == 151936 * 896 + 24 * layer + 896 == 494_032_768


def test_the_table_is_that_of_the_published_models() -> None:
    # Weights in the published checkpoints, as their pages on the hub say (a tied head once).
    billions = {
        "Qwen2.5-3B": 3.09,
        "Qwen2.5-7B": 7.62,
        "Qwen2.5-32B": 32.76,
        "Qwen3-4B": 4.02,
        "Qwen3-14B": 14.77,
    }
    for name, size in billions.items():
        assert round(KNOWN_SHAPES[f"Qwen/{name}"].total_params / 1e9, 2) == size
    assert len(KNOWN_SHAPES) == 12


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-3B", "Qwen/Qwen3-8B"])
def test_config_json_gives_the_known_shape(name: str) -> None:
    config = config_of(KNOWN_SHAPES[name]).to_dict()
    assert ModelShape.from_config(config, name) == KNOWN_SHAPES[name]
    nope = config | {"model_type": f"{config['model_type']}_nope", "nope_layers": [1]}
    assert ModelShape.from_config(nope, name) == KNOWN_SHAPES[name]


def test_absent_keys_mean_what_transformers_takes_them_for() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    sizes |= {"vocab_size": 10, "num_key_value_heads": None}
    for family, config_class in CONFIGS.items():
        shape = ModelShape.from_config(sizes | {"model_type": family})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_class(**sizes))
        assert shape.query_size == model.model.layers[0].self_attn.q_proj.out_features
        assert shape.key_value_size == model.model.layers[0].self_attn.k_proj.out_features
        assert shape.total_params == count(model)


def test_bad_configs_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'llama'"):
        ModelShape.from_config({"model_type": "llama"})
    with pytest.raises(ConfigError, match=r"dir: num_hidden_layers, vocab_size must be"):
        sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 8}
        ModelShape.from_config(sizes | {"model_type": "qwen2"}, "dir")
    with pytest.raises(ConfigError, match=r"did you mean 'Qwen/Qwen2\.5-3B'"):
        known_shape("Qwen/Qwen25-3B")


def test_instruct_and_base_models_have_the_plain_shape() -> None:
    assert replace(known_shape("Qwen/Qwen2.5-3B-Instruct"), name="") == replace(
        KNOWN_SHAPES["Qwen/Qwen2.5-3B"], name=""
    )
    assert known_shape("Qwen/Qwen3-4B-Base").num_hidden_layers == 36


def test_trainable_parameters_by_hand() -> None:
    attention, layer = 192 + 16, 192 + 16 + 384 + 16
    assert Trainable.of("all").params(TINY) == 800 + 4 * layer + 8 == TINY.total_params
    assert Trainable.of({1, 2}).params(TINY) == 2 * layer
    assert Trainable.of({1, 2}, attention_only=True).params(TINY) == 2 * attention
    assert Trainable.of(()).params(TINY) == 0

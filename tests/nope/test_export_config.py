"""The config.json of a native export: complete, and refused where an architecture cannot express it."""

import pytest

from flare.errors import ConfigError
from flare.nope.export.native import to_native


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic'"),
        ("qwen2", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE scaling 'longrope'"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "quantised"),
        ("qwen2", {"model_type": "qwen2", "nope_layers": []}, "has no NoPE layers"),
        ("qwen2", {"model_type": "llama"}, "'llama' model"),
        ("qwen2", {"model_type": "smollm3", "no_rope_layers": [0, 1]}, "native export already"),
        ("qwen2", {"use_sliding_window": True}, "sliding-window"),
        ("qwen3", {"nope_layers": [0, 1]}, "all 2 layers of MODEL are NoPE layers"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_no_runtime_can_represent_is_refused_by_name(family: str, changes: dict, words: str) -> None:
    config = {"model_type": f"{family}_nope", "num_hidden_layers": 2, "nope_layers": [0], "rope_theta": 1e6}
    with pytest.raises(ConfigError, match=words):
        to_native(config | changes, "MODEL")


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_export_config_says_everything_that_the_defaults_would_say_otherwise(family: str) -> None:
    """What a Qwen config leaves out, and SmolLM3 and ExaoneMoe would fill in with values of their own."""
    config = {"model_type": f"{family}_nope", "num_hidden_layers": 2, "nope_layers": [0], "rope_theta": 1e6}
    native = to_native(config, "MODEL")
    assert (native["pad_token_id"], native["bos_token_id"], native["eos_token_id"]) == (None, None, None)
    assert (native["rms_norm_eps"], native["tie_word_embeddings"]) == (1e-6, False)
    assert native["rope_theta"] == native["rope_parameters"]["rope_theta"] == 1e6
    assert native.get("head_dim") == (128 if family == "qwen3" else None)
    if family == "qwen3":
        assert native["is_moe_layer"] == [False, False]
        assert native["sliding_window"] >= native["max_position_embeddings"]
        assert native["sliding_window_pattern"] is None

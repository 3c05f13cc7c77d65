"""README.md of a native export: its origin, and which runtimes run it correctly or wrongly."""

from pathlib import Path

from flare.nope.config_json import nope_layers_of
from flare.nope.export.bit_equality import Comparison
from flare.nope.layers import format_layers

FACTS = {
    "smollm3": {
        "family": "Qwen2/Qwen2.5",
        "class": "SmolLM3ForCausalLM",
        "transformers": "4.53",
        "vllm": "through its Transformers backend (`--model-impl transformers` where it does not choose it itself)",
        "sglang": "through its Transformers backend (`--model-impl transformers`)",
    },
    "exaone_moe": {
        "family": "Qwen3",
        "class": "ExaoneMoeForCausalLM with dense MLPs",
        "transformers": "5.1",
        "vllm": "its own implementation",
        "sglang": "its own implementation",
    },
}

CARD = """\
---
library_name: transformers
tags: [nope]
---
# {family} with NoPE layers, as {class}

A {family} model without rotary position embedding (RoPE) in some layers, written as an architecture that stock
runtimes know. It needs no custom code.

| | |
|---|---|
| made from | `{made_from}` |
| NoPE layers (0-based) | {layers} of {depth} |
| rope_theta of the others | {theta:g} |
| RoPE type | {rope_type} |
| attention temperature of the NoPE layers | {temperature} |
| trained tokens | {trained_tokens} |

Checked when it was written: {compared}.

## What runs it
| runtime | |
|---|---|
| transformers >= {transformers} | checked as described above |
| vLLM | {vllm}; not run here |
| SGLang | {sglang}; not run here |
| llama.cpp (GGUF) | {gguf} |

A runtime that puts RoPE back still answers, and perplexity does not show it. `patch_qwen_rope.py --verify DIR` of
Flare checks this directory against its config.json.

Weight files may be hard links to those of the model that this one was made from: write other files, not these.
"""


def export_card(config: dict, compared: Comparison, source: Path) -> str:
    """README.md for an export with this config.json. Of ``source`` only the last two names: cards are published."""
    rope = config["rope_parameters"]
    return CARD.format(
        **FACTS[config["model_type"]],
        made_from=Path(*source.absolute().parts[-2:]),
        layers=format_layers(nope_layers_of(config)),
        depth=config["num_hidden_layers"],
        theta=rope["rope_theta"],
        rope_type=rope["rope_type"],
        temperature=config.get("nope_temperature", "1"),
        trained_tokens=(config.get("flare") or {}).get("trained_tokens", "not recorded"),
        compared=compared,
        gguf=gguf_limits(config),
    )


def gguf_limits(config: dict) -> str:
    """What llama.cpp would make of the export. Source: shared/FIELD.md, from llama.cpp's sources."""
    if config["model_type"] != "smollm3":
        return "not tried"
    every_fourth = list(range(3, config["num_hidden_layers"], 4))
    if nope_layers_of(config) == every_fourth:
        return (
            "its smollm3 leaves RoPE out of layers 3, 7, 11, ..., which are this model's; it knows no o_proj bias "
            "(all zeros here): leave those tensors out. Not tried"
        )
    return (
        "**do not convert**: its smollm3 leaves RoPE out of layers 3, 7, 11, ... whatever config.json says, so the "
        "result would run, with RoPE in the wrong layers"
    )

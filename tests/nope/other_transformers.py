"""Run under another transformers, without this repo: open models and compare them with what our release computed.

    python other_transformers.py VERSION REFERENCES RESULTS TRUSTED...

Not a test by itself: test_transformers_versions.py starts it. REFERENCES has a folder for each model with
``model`` (a link to it) and ``reference.safetensors``; those named TRUSTED are opened with trust_remote_code.
RESULTS is the JSON file that is written: name -> check -> result.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def open_model(directory: Path, trust: bool) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust).eval()


def opens_without_trust(directory: Path) -> str:
    """The name of the error, or ``opened``."""
    try:
        AutoModelForCausalLM.from_pretrained(directory)
    except (ValueError, KeyError) as error:
        return type(error).__name__
    return "opened"


def generate(
    model: transformers.PreTrainedModel, prompt: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: object
) -> torch.Tensor:
    """Twelve greedy tokens after each prompt, (B, T + 12)."""
    mask = torch.ones_like(prompt) if mask is None else mask
    ends = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=mask, do_sample=False, **ends, **kwargs)


def padded(prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompts, mask) in which the first prompt is three tokens shorter and padded on the left."""
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    return prompt * mask, mask


def check(directory: Path, trust: bool) -> dict:
    """What the model of a reference folder does here, compared with the reference."""
    reference = load_file(directory / "reference.safetensors")
    tokens = reference["tokens"]
    model = open_model(directory / "model", trust)
    with torch.no_grad():
        logits = model(tokens).logits
        results = {
            "without_trust": opens_without_trust(directory / "model"),
            "class": type(model).__name__,
            "logits_difference": (logits - reference["logits"]).abs().max().item(),
        }
        for cache in ("dynamic", "static"):
            for batch, prompt in {"": (tokens[:, :8],), "_padded": padded(tokens[:, 8:16])}.items():
                found = generate(model, *prompt, cache_implementation=cache)
                results[f"{cache}_cache{batch}_equal"] = torch.equal(found, reference[f"generated{batch}"])
        with tempfile.TemporaryDirectory() as again:
            model.save_pretrained(again)
            results["round_trip_equal"] = torch.equal(open_model(Path(again), trust)(tokens).logits, logits)
            results["round_trip_without_trust"] = opens_without_trust(Path(again))
    return results


def main(version: str, references: str, results: str, *trusted: str) -> None:
    assert transformers.__version__ == version, transformers.__version__
    assert not any(name == "flare" or name.startswith("flare.") for name in sys.modules)
    folders = sorted(Path(references).iterdir())
    found = {folder.name: check(folder, folder.name in trusted) for folder in folders}
    Path(results).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

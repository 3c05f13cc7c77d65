"""evaluation_results.json: its content, written atomically.

Schema version 1. A results dict is plain JSON from the start; whatever is measured later (context
lengths, passkey, ...) is one more key next to ``datasets``.
"""

import math
import resource
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from flare.data.token_cache.encode import tokenizer_sha256
from flare.errors import FlareError
from flare.evaluation.options import EvaluationSettings
from flare.evaluation.scoring.context import num_targets
from flare.evaluation.scoring.perplexity import DatasetScore
from flare.evaluation.scoring.token_sequences import resolve_prefix
from flare.files import write_json

SCHEMA_VERSION = 1


def new_results(model: dict, settings: dict, environment: dict) -> dict:
    """Results without data sets.

    Args:
        model: a ``model_record``.
        settings: ``printed_settings``.
        environment: versions and hardware.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "model": model,
        "settings": settings,
        "environment": environment,
        "datasets": {},
        "throughput": {"tokens_per_sec": None, "peak_memory_bytes": None},
    }


def printed_settings(settings: EvaluationSettings, tokenizer, world_size: int) -> dict:
    """The settings that the report lists: those that affect or describe the numbers."""
    hidden = (
        "output_dir", "cache_dir", "data_mirror", "model_path", "datasets", "compare_to", "gpu_type", "gpu_ids",
        "allow_busy_gpus", "nproc_per_node", "ddp_timeout", "use_default_datasets", "lm_eval_tasks", "lm_eval_limit",
        "prefix_token_id",
    )  # fmt: skip
    kept = {k: v for k, v in asdict(settings).items() if k not in hidden and v not in (None, ())}
    kept = {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}
    if settings.context_lengths:
        kept["context_length_targets"] = num_targets(list(settings.context_lengths))
    if not settings.passkey:
        kept.pop("passkey_samples")
    prefix = resolve_prefix(tokenizer, settings.prefix_token_id)
    return kept | {
        "stride": settings.stride,
        "prefix_token": f"{tokenizer.convert_ids_to_tokens(prefix)} ({prefix})",
        "processes": world_size,
    }


def add_dataset(results: dict, name: str, score: DatasetScore, more: dict | None = None) -> None:
    """Add a scored data set; ``more`` holds LAMBADA metrics."""
    results["datasets"][name] = score.to_json() | (more or {})


def add_failure(results: dict, name: str, error: Exception | str) -> None:
    """Add a data set that could not be read or scored."""
    results["datasets"][name] = {"status": "failed", "error": str(error)}


def add_throughput(results: dict, scores: list[DatasetScore], device: torch.device | str) -> None:
    """Add scored tokens per second (without warm-up, over all data sets) and peak memory."""
    seconds = sum(score.timed_sec for score in scores)
    tokens = sum(score.timed_tokens for score in scores)
    results["throughput"] = {
        "tokens_per_sec": tokens / seconds if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(device),
    }


def model_record(model: nn.Module, tokenizer, path: str, probed_layers: list[int] | None) -> dict:
    """The entry ``model`` of evaluation_results.json.

    Args:
        path: directory of the model.
        probed_layers: layers that ignore positions according to the probe; None if the architecture cannot be
            probed. ``nope_probe.verified`` says whether they are the configured layers (null for None).
    """
    config = model.config
    declared = declared_nope_layers(config)
    return {
        "path": str(path),
        "model_type": config.model_type,
        "nope_layers": declared,
        "rope_theta": rope_theta(config),
        # parameters() counts tied weights once.
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "nope_probe": {
            "verified": None if probed_layers is None else sorted(probed_layers) == declared,
            "layers": sorted(probed_layers or []),
        },
    }


def declared_nope_layers(config) -> list[int]:
    """NoPE layers in a configuration: ``nope_layers`` of Flare, or ``no_rope_layers`` of SmolLM3."""
    if getattr(config, "nope_layers", None) is not None:
        return sorted(config.nope_layers)
    # SmolLM3 and Llama 4 list a number per layer, and there 1 means that the layer uses RoPE.
    uses_rope = getattr(config, "no_rope_layers", None) or []
    return [layer_idx for layer_idx, uses in enumerate(uses_rope) if not uses]


def rope_theta(config) -> float | None:
    """The base of the rotary frequencies; None for a model without RoPE or with one base per layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_theta", getattr(config, "rope_theta", None))


def peak_memory_bytes(device: torch.device | str) -> int:
    """On CUDA, the peak of the allocator; otherwise the peak resident memory of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_results(results: dict, path: Path | str) -> None:
    """Write the file atomically. Called after each part, so that an interruption loses no results.

    Raises: FlareError with the key of a number that is not finite; the old file is kept.
    """
    bad = nonfinite_key(results)
    if bad:
        raise FlareError(f"{Path(path).name}: {bad} is not a finite number; not written")
    write_json(path, results)


def nonfinite_key(value, key: str = "") -> str | None:
    """Dotted path of the first NaN or infinity in nested dicts and lists, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else key
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return None
    paths = (nonfinite_key(child, f"{key}.{name}".lstrip(".")) for name, child in children)
    return next((path for path in paths if path), None)

"""Results and comparison rows written by hand, for the tests of verdict, report and plots."""

import math
from pathlib import Path

from flare.evaluation.report.comparison_rows import ComparisonRow
from flare.evaluation.report.report import write_report

BASE, PATCHED, STAGE1, STAGE2 = 2.0, 3.0, 2.25, 2.03


def row(label: str, role: str, loss: float, *, tokenizer: str = "t1", bits: float | None = None, training=None):
    if training is None and role in ("trained", "control"):
        training = {"stages": [1] if label == "stage 1" else [1, 2]}
    bits = bits or loss / 2
    return ComparisonRow(label, role, "embedded", loss, math.exp(loss), bits, tokenizer, training=training)


def four_rows() -> list[ComparisonRow]:
    return [
        row("base", "base", BASE),
        row("patched", "patched", PATCHED),
        row("stage 1", "trained", STAGE1),
        row("stage 2", "trained", STAGE2),
    ]


def example_results(nope_layers=(4, 5, 6), loss: float = STAGE2) -> dict:
    layers = list(nope_layers)
    scored = {
        "status": "ok", "num_documents": 12, "num_tokens": 3456, "num_bytes": 12345, "num_words": 2000,
        "truncated_documents": 0, "loss": loss, "perplexity": math.exp(loss), "bits_per_byte": 0.8123,
        "word_perplexity": None, "byte_perplexity": 1.7561, "token_accuracy": 43.21,
        "loss_by_position": [
            {"from": 0, "to": 1, "loss": 4.0, "num_tokens": 12},
            {"from": 1, "to": 2, "loss": 3.0, "num_tokens": 11},
        ],
    }  # fmt: skip
    return {
        "schema_version": 1,
        "model": {
            "path": "/runs/my run/final_model", "model_type": "qwen2_nope", "nope_layers": layers, "rope_theta": 1e6,
            "num_parameters": 1234567, "tokenizer_sha256": "t1",
            "nope_probe": {"verified": True, "layers": layers},
        },
        "settings": {"protocol": "document", "max_length": 128, "prefix_token_id": 0, "precision": "fp32"},
        "environment": {"torch": "2.13.0"},
        "datasets": {"embedded": scored},
        "throughput": {"tokens_per_sec": 1234.5, "peak_memory_bytes": 2**30},
    }  # fmt: skip


def report(tmp_path: Path, results: dict, plots=(), rows=None, **more) -> str:
    path = tmp_path / "evaluation_report.md"
    write_report(results, path, list(plots), rows, **more)
    return path.read_text(encoding="utf-8")

"""The provenance in every result (machine, versions, commit, command), and the tables."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from flare.cpu import processor_name
from flare.files import REPO

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "liger-kernel", "flash-attn")


def machine() -> dict:
    """Processor, cores, memory and the first GPU, as far as they can be read."""
    facts = {"cpu": processor_name(), "cores": os.cpu_count(), "memory_gib": round(_memory_bytes() / 2**30, 1)}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            gpu = torch.cuda.get_device_properties(0)
            facts |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
    return facts


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def versions() -> dict[str, str]:
    """Python's and the packages' that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, marked when the tree differed from it."""
    revision, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", "flare", "benchmarks/*.py")
    return (revision or "unknown") + (" with changes" if changed else "")


def _git(*words: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(REPO), *words], capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def write(name: str, results: dict) -> Path:
    """Write results/NAME.json with where the numbers come from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {
        "command": " ".join(["python -m benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **results,
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that is also aligned on a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def ratio_table(ratios: dict[str, float], targets: dict[str, tuple[float, str]]) -> str:
    """A line a ratio: what was measured, and whether its target ("at least" or "at most" so much) was met."""
    rows = []
    for name, value in ratios.items():
        target, sense = targets[name]
        met = value >= target if sense == "at least" else value <= target
        rows.append([name, f"{value:.2f}", f"{sense} {target}", "met" if met else "MISSED"])
    return table(["ratio", "measured", "target", ""], rows)

"""Results in TensorBoard: tables as text, curves by position and context length, plots as images.

The evaluated model and each compared model have a run of their own, so that TensorBoard overlays their curves.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from flare.evaluation.report.figures import Plot
from flare.evaluation.report.verdict import scored_datasets

SCALARS = (
    "loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "token_accuracy",
    "lambada_accuracy", "lambada_perplexity",
)  # fmt: skip
EVENTS_SUFFIX = ".evaluation"
"""Suffix of the event files. Event files of training in the same directory are kept."""
IMAGE_WIDTH = 850
"""Pixels; TensorBoard crops images that are wider than its panel (in a window of 1,250 pixels)."""


def write_tensorboard(results: dict, log_dir: Path | str, plots: list[Plot], label: str, report: str) -> None:
    """Write event files; those of an earlier evaluation are deleted.

    Args:
        results: the content of evaluation_results.json. Tags are ``results/<data set>/<metric>``;
            ``by_position/<data set>`` has the position as its step, ``by_context/<data set>`` the context length.
        plots: for the image tab. label: label of the evaluated model.
        report: the report's Markdown; the part before its plots goes to the text tab.
    """
    for old in Path(log_dir).rglob(f"events.out.tfevents.*{EVENTS_SUFFIX}"):
        old.unlink(missing_ok=True)  # another evaluation may delete it at the same time
    with _writer(Path(log_dir)) as writer:
        _write_scores(writer, scored_datasets(results), results.get("context_lengths") or {})
        for name, entry in scored_datasets(results).items():
            for bucket in entry["loss_by_position"]:
                writer.add_scalar(f"by_position/{name}", bucket["loss"], bucket["from"])
        for metric, value in results["throughput"].items():
            if value is not None:
                writer.add_scalar(f"results/throughput/{metric}", value, 0)
        writer.add_text("report", report.partition("\n## Plots")[0])
        for plot in plots:
            with Image.open(plot.path) as image:
                small = image.convert("RGB")
                small.thumbnail((IMAGE_WIDTH, image.height), Image.Resampling.LANCZOS)
                writer.add_image(plot.tag, np.asarray(small), 0, dataformats="HWC")
    for other in results.get("milestones", ()):
        if other["label"] != label:
            with _writer(Path(log_dir) / other["label"].replace("/", "_")) as writer:
                _write_scores(writer, other["datasets"], other["context_lengths"])


def _writer(log_dir: Path) -> SummaryWriter:
    return SummaryWriter(str(log_dir), filename_suffix=EVENTS_SUFFIX)


def _write_scores(writer: SummaryWriter, datasets: dict, contexts: dict) -> None:
    for name, entry in datasets.items():
        for metric in SCALARS:
            if entry.get(metric) is not None:
                writer.add_scalar(f"results/{name}/{metric}", entry[metric], 0)
    for name, rows in contexts.items():
        for row in rows:
            if row["perplexity"] is not None:
                writer.add_scalar(f"by_context/{name}", row["perplexity"], row["context_length"])

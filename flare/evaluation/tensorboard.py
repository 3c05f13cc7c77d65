"""The results in TensorBoard: a scalar a metric, the loss by position as a curve, the plots as images."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from flare.evaluation.figures import Plot
from flare.evaluation.verdict import scored_datasets

SCALARS = (
    "loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "token_accuracy",
    "lambada_accuracy", "lambada_perplexity",
)  # fmt: skip


def write_tensorboard(results: dict, log_dir: Path | str, plots: list[Plot]) -> None:
    """Write one event file, in place of those of an evaluation before.

    Args:
        results: of ``evaluation_results.json``. Tags are ``eval/<data set>/<metric>``;
            ``eval/<data set>/loss_by_position`` has the position as its step,
            ``eval/<data set>/perplexity_by_context`` the context length.
        plots: for the image tab.
    """
    for old in Path(log_dir).glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(log_dir)) as writer:
        for name, entry in scored_datasets(results).items():
            for metric in SCALARS:
                if entry.get(metric) is not None:
                    writer.add_scalar(f"eval/{name}/{metric}", entry[metric], 0)
            for bucket in entry["loss_by_position"]:
                writer.add_scalar(f"eval/{name}/loss_by_position", bucket["loss"], bucket["from"])
        for name, rows in (results.get("context_lengths") or {}).items():
            for row in rows:
                if row["perplexity"] is not None:
                    writer.add_scalar(f"eval/{name}/perplexity_by_context", row["perplexity"], row["context_length"])
        for metric, value in results["throughput"].items():
            if value is not None:
                writer.add_scalar(f"eval/throughput/{metric}", value, 0)
        for plot in plots:
            with Image.open(plot.path) as image:
                writer.add_image(plot.tag, np.asarray(image.convert("RGB")), 0, dataformats="HWC")

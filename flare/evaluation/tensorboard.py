"""The results in TensorBoard: a scalar a metric, the loss by position as a curve, the plots as images."""

from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from flare.evaluation.verdict import scored_datasets

SCALARS = (
    "loss", "perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "token_accuracy",
)  # fmt: skip


def write_tensorboard(results: dict, log_dir: Path | str, figures: dict[str, Path | str]) -> None:
    """Write one event file.

    Args:
        results: of ``evaluation_results.json``. Tags are ``eval/<data set>/<metric>``;
            ``eval/<data set>/loss_by_position`` has the position as its step.
        figures: tag -> PNG file, for the image tab.
    """
    with SummaryWriter(str(log_dir)) as writer:
        for name, entry in scored_datasets(results).items():
            for metric in SCALARS:
                if entry[metric] is not None:
                    writer.add_scalar(f"eval/{name}/{metric}", entry[metric], 0)
            for bucket in entry["loss_by_position"]:
                writer.add_scalar(f"eval/{name}/loss_by_position", bucket["loss"], bucket["from"])
        for metric, value in results["throughput"].items():
            if value is not None:
                writer.add_scalar(f"eval/throughput/{metric}", value, 0)
        for tag, path in figures.items():
            with Image.open(path) as image:
                writer.add_image(tag, np.asarray(image.convert("RGB")), 0, dataformats="HWC")

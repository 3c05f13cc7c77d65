"""Helpers of the tests of GPU selection."""

from flare.gpus.selection import (
    Selection,
)

GUIDE_GPUS = "GPUs found: 0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"


def indices(selection: Selection) -> list[int]:
    return [gpu.index for gpu in selection.gpus]


def skipped(selection: Selection) -> list[int]:
    return [skip.gpu.index for skip in selection.skipped]

"""Converts a batch of packed rows to the tensors of the training model."""

import torch

from flare.data.training_rows import Batch
from flare.model.attention import document_bounds


def host_tensors(batch: Batch, pin: bool = False) -> dict[str, torch.Tensor]:
    """A batch as the arguments of the training model, in host memory; see ``TrainingModel.forward``."""
    arrays = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "position_ids": batch.position_ids,
        "document_bounds": document_bounds(batch.position_ids),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # A non-contiguous view would be copied to unpinned memory on its way to the GPU.
    return {name: tensor.contiguous().pin_memory() for name, tensor in tensors.items()} if pin else tensors


def to_device(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on the device. Copies from pinned memory are asynchronous."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}

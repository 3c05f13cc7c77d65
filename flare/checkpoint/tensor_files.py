"""Named tensors in one or several safetensors files: written by all ranks together, read one tensor at a time.

Files and index are named as in transformers. Every file holds complete tensors, also when the ranks hold shards. So a
state that four ranks wrote loads on three ranks, on one, and as a model. Rank 0 writes a small state as one file; a
large state is divided into files of a few GiB, which the ranks write at the same time.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flare.distributed.fsdp import full_tensor, is_sharded, local_row_range
from flare.distributed.process_group import World, raise_first_failure
from flare.errors import CheckpointError, first_line, is_out_of_memory
from flare.files import write_json
from flare.nope.config_json import weight_files
from flare.nope.weight_files import is_safetensors, load_bin, save_tensors

MAX_FILE_BYTES = 4 * 2**30
"""Limit of a file, and so of the host memory that a rank needs to write it. A larger tensor has its own file."""


@dataclass(frozen=True)
class TensorFile:
    """A file to write: its name, its tensors, and the rank that writes it."""

    name: str
    tensors: tuple[str, ...]
    owner: int


def files_for(sizes: dict[str, int], stem: str, world_size: int, limit_bytes: int) -> list[TensorFile]:
    """Divide tensors (name -> bytes), in order, into files of at most ``limit_bytes``, assigned to ranks in turn."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [TensorFile(f"{stem}.safetensors", tuple(groups[0]), 0)]
    return [
        TensorFile(f"{stem}-{number:05}-of-{len(groups):05}.safetensors", tuple(names), (number - 1) % world_size)
        for number, names in enumerate(groups, 1)
    ]


def write_tensors(
    tensors: dict[str, torch.Tensor], directory: Path, stem: str, world: World, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write named tensors, sharded or not, to ``<stem>.safetensors`` or several files and their index. A collective.

    Args:
        tensors: the same names in the same order on every rank; those that are not sharded have the same values.
        dtype: of the files; default: the dtype of each tensor.
    Returns: the files that this rank wrote.
    Raises: OSError on all ranks when one of them cannot write.
    """
    sizes = {name: t.numel() * (dtype or t.dtype).itemsize for name, t in tensors.items()}
    files = files_for(sizes, stem, world.size, MAX_FILE_BYTES)
    written, failure = [], None
    for first in range(0, len(files), world.size):
        held = {}
        for file in files[first : first + world.size]:  # all ranks gather, also a rank that has failed
            held |= _gather_file(tensors, file, world, dtype)
        own = [file for file in files[first : first + world.size] if file.owner == world.rank]
        for file in own if failure is None else ():
            failure = _failure_of(save_tensors, held, directory / file.name)
            written.append(directory / file.name)
    if len(files) > 1 and world.is_main:
        index = directory / f"{stem}.safetensors.index.json"
        weight_map = {name: file.name for file in files for name in file.tensors}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        failure = failure or _failure_of(write_json, index, content)
        written.append(index)
    raise_first_failure(failure)
    return written


def write_pickled(
    tensors: dict[str, torch.Tensor], path: Path, world: World, dtype: torch.dtype | None = None
) -> list[Path]:
    """Write named tensors to one file of torch.save, all of it in rank 0's memory. Otherwise as ``write_tensors``."""
    held = _gather_file(tensors, TensorFile(path.name, tuple(tensors), 0), world, dtype)
    raise_first_failure(_failure_of(_save_pickled, held, path) if world.is_main else None)
    return [path] if world.is_main else []


def _save_pickled(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        torch.save(tensors, path)
    except RuntimeError as error:  # torch's exception for a full disk
        if is_out_of_memory(error):
            raise
        raise OSError(first_line(error)) from error


def _gather_file(
    tensors: dict[str, torch.Tensor], file: TensorFile, world: World, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The complete tensors of a file, on the CPU of its owner. A collective for sharded tensors.

    Only one complete tensor at a time is on a GPU.
    """
    held = {}
    for name in file.tensors:
        tensor = full_tensor(tensors[name]) if is_sharded(tensors[name]) or file.owner == world.rank else None
        if file.owner == world.rank:
            held[name] = tensor.detach().to("cpu", dtype or tensor.dtype)
    return held


def _failure_of(work: Callable, *args: object) -> OSError | None:
    try:
        work(*args)
    except OSError as error:
        return error
    return None


class TensorReader:
    """Reads the tensors of a set of files by name, one at a time, and only the rows that are needed.

    Raises: CheckpointError for files that cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.handles: dict[str, object] = {}
        files = list(files)
        try:
            for file in files:
                if is_safetensors([file]):
                    handle = safe_open(file, "pt")
                    self.handles |= dict.fromkeys(handle.keys(), handle)
                else:
                    self.handles |= {name: {name: tensor} for name, tensor in load_bin(file).items()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        self.directory = files[0].parent if files else Path()

    @classmethod
    def of_model(cls, directory: Path) -> "TensorReader":
        """The weights of a model directory."""
        return cls(weight_files(directory))

    @classmethod
    def of_state(cls, directory: Path, stem: str) -> "TensorReader":
        """The tensors that ``write_tensors`` wrote with this stem."""
        index = directory / f"{stem}.safetensors.index.json"
        if not index.is_file():
            return cls([directory / f"{stem}.safetensors"])
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return cls([directory / name for name in sorted(set(names))])

    def names(self) -> set[str]:
        return set(self.handles)

    def read(self, name: str) -> torch.Tensor:
        """A complete tensor."""
        handle = self.handles[name]
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def copy_into(self, name: str, target: torch.Tensor) -> None:
        """Copy a tensor into one of the same shape, in the target's dtype; for a sharded target this rank's rows.

        Raises: CheckpointError for another shape.
        """
        handle = self.handles[name]
        source = handle[name] if isinstance(handle, dict) else handle.get_slice(name)
        shape = list(source.shape if isinstance(handle, dict) else source.get_shape())
        if shape != list(target.shape):
            raise CheckpointError(f"{self.directory}: {name} has shape {shape}, the model needs {list(target.shape)}")
        if is_sharded(target):
            first, last = local_row_range(target)
            target.to_local().copy_(source[first:last])
        else:
            target.copy_(source[...] if shape else self.read(name))


@torch.no_grad()
def restore_weights(causal_lm: torch.nn.Module, reader: TensorReader) -> None:
    """Copy every weight of a model directory into the model, in its dtype. On a sharded model: this rank's rows.

    Raises: CheckpointError when names or shapes differ.
    """
    parameters = dict(causal_lm.named_parameters())
    tied = {"lm_head.weight"} - set(parameters)
    different = sorted((reader.names() - tied) ^ set(parameters))
    if different:
        raise CheckpointError(
            f"{reader.directory} holds other weights than the model (first difference: {different[0]})"
        )
    for name, parameter in parameters.items():
        reader.copy_into(name, parameter.data)

"""Transfers weight files to another model directory: unchanged files are linked, changed ones rewritten.

One tensor or one shard is in memory at a time, never the complete model. The callers (patch.py, export.py) describe
changes as a ``Change``.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flare.errors import CheckpointError
from flare.files import file_mode
from flare.nope.config_json import weight_files
from flare.nope.temperature import scaled

CHUNK_BYTES = 4 * 2**30
"""Shards made from pytorch_model.bin files are at most this large, or one tensor."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
"""As safetensors headers name them; others are quantised weights, which cannot be changed here."""


@dataclass(frozen=True)
class Change:
    """Changes to the tensors of a checkpoint.

    drop: names of tensors to leave out; all their values must be 0.
    scale: name -> factor.
    zeros: names of new biases, each with the rows and the dtype of the weight of the same module.
    """

    drop: frozenset[str] = frozenset()
    scale: dict[str, float] = field(default_factory=dict)
    zeros: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.drop or self.scale or self.zeros)

    def apply_all(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Apply the changes to all tensors; unchanged tensors are the same objects. Raises: as ``apply``."""
        changed = {name: self.apply(name, tensor) for name, tensor in tensors.items()}
        return {name: tensor for name, tensor in changed.items() if tensor is not None}

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the changed tensor, or None when it is left out.

        Raises: CheckpointError when a dropped value is not 0 or a scaled value overflows.
        """
        if name in self.drop:
            if tensor.count_nonzero():
                raise CheckpointError(f"{name} is not 0: it was trained, and a Qwen2 model has no place for it")
            return None
        return scaled(name, tensor, self.scale[name]) if name in self.scale else tensor


def read_header(path: Path) -> dict[str, dict]:
    """Read the header of a safetensors file: name -> {"dtype", "shape", "data_offsets"}. Reads no tensor.

    Raises: CheckpointError when it is not a safetensors file, or truncated (an incomplete download).
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if size != needed:
            raise ValueError(f"{size} bytes instead of {needed}")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file: {error}; download it again") from error
    return header


def is_safetensors(files: list[Path]) -> bool:
    return all(file.suffix == ".safetensors" for file in files)


def check_weights(directory: Path, names: set[str]) -> list[Path]:
    """Check that the weight files are complete and have tensors of all these names. Returns the files.

    .bin files are only checked for existence.

    Raises: CheckpointError for a missing or truncated file, or a missing tensor.
    """
    files = weight_files(directory)
    if not is_safetensors(files):
        return files
    found = {name for file in files for name in read_header(file)}
    missing = sorted(names - found)
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} of {len(names)} tensors that its config.json needs "
            f"(first: {missing[0]}); is its index complete?"
        )
    return files


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link to the real file (hub snapshots are symbolic links), or a copy where links are not possible."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, facts: dict[str, str] | None = None) -> None:
    """A safetensors file with the permissions of the umask (safetensors itself writes 0600)."""
    metadata = {"format": "pt"} | (facts or {})
    try:
        save_file({n: tensor.contiguous() for n, tensor in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:  # safetensors' exception for a full disk
        raise OSError(str(error)) from error
    os.chmod(path, file_mode())


def transfer_weights(source: Path, temporary: Path, change: Change, to_safetensors: bool = False) -> None:
    """Write ``source``'s weights with this change into the directory ``temporary``.

    Without a change, the files are linked under their names, also pickled ones unless ``to_safetensors``. Otherwise
    changed shards are rewritten, the others linked, and all get new numbers and a new index.

    Raises: CheckpointError as ``Change.apply``, when a file cannot be read, or when a tensor to change is missing.
    """
    files = weight_files(source)
    if not change and (is_safetensors(files) or not to_safetensors):
        for file in files:
            link_or_copy(file, temporary / file.name)
        index = "model.safetensors.index.json" if is_safetensors(files) else "pytorch_model.bin.index.json"
        if (source / index).is_file():
            shutil.copyfile(source / index, temporary / index)
        return
    files_to_write = list(_shard_pieces(files, change) if is_safetensors(files) else _bin_pieces(files, change))
    weights = {name: tensor for piece in files_to_write for name, tensor in piece.tensors.items()}
    models = {name: name.removesuffix("bias") + "weight" for name in change.zeros}
    if missing := sorted({*change.scale, *models.values()} - weights.keys()):  # .bin files are first read here
        raise CheckpointError(f"{source} lacks {len(missing)} tensors that its config.json needs: {missing[0]}, ...")
    if change.zeros:
        like = {name: weights[model] for name, model in models.items()}
        zeros = {name: torch.zeros(weight.shape[0], dtype=weight.dtype) for name, weight in like.items()}
        files_to_write.append(_WeightFile(zeros, partial(save_tensors, zeros)))
    _write_pieces(files_to_write, temporary)


@dataclass(frozen=True)
class _WeightFile:
    """A weight file to write: its tensors (on the meta device where only shape and dtype matter), and its writer."""

    tensors: dict[str, torch.Tensor]
    write: Callable[[Path], None]


def _shard_pieces(files: list[Path], change: Change) -> Iterator[_WeightFile]:
    for file in files:
        tensors = {name: _described(file, name, entry) for name, entry in read_header(file).items()}
        kept = {name: tensor for name, tensor in tensors.items() if name not in change.drop}
        touched = (change.drop | change.scale.keys()) & tensors.keys()
        if touched and not kept:
            change.apply_all(_mapped(file))  # raises when a dropped value is not 0
        elif touched:
            yield _WeightFile(kept, partial(_rewrite, file, change))
        else:
            yield _WeightFile(kept, partial(link_or_copy, file))


def _described(file: Path, name: str, entry: dict) -> torch.Tensor:
    """Shape and dtype of a tensor on disk."""
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{file}: {name} is of type {entry['dtype']}; give the model before quantisation")
    return torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard, memory-mapped."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no dict)


def _rewrite(file: Path, change: Change, target: Path) -> None:
    save_tensors(change.apply_all(_mapped(file)), target)


def _bin_pieces(files: list[Path], change: Change) -> Iterator[_WeightFile]:
    """The tensors of pickled files, in shards of at most CHUNK_BYTES."""
    for file in files:
        chunk: dict[str, torch.Tensor] = {}
        for name, tensor in load_bin(file).items():
            if chunk and sum(t.nbytes for t in chunk.values()) + tensor.nbytes > CHUNK_BYTES:
                yield _WeightFile(chunk, partial(_save_changed, chunk, change))
                chunk = {}
            chunk[name] = tensor
        yield _WeightFile(chunk, partial(_save_changed, chunk, change))


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickled file, memory-mapped, without running code of the pickle and without a tied lm_head.

    Raises: CheckpointError for a file with anything but tensors.
    """
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        embedding, head = (state.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if embedding is not None and head is not None and embedding.data_ptr() == head.data_ptr():
            del state["lm_head.weight"]  # safetensors files hold a tensor once
        return dict(state)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as a file of plain tensors: {reason}") from error


def _save_changed(tensors: dict[str, torch.Tensor], change: Change, target: Path) -> None:
    save_tensors(change.apply_all(tensors), target)


def _write_pieces(files_to_write: list[_WeightFile], temporary: Path) -> None:
    """Write the files, numbered as in transformers, and their index when there are several."""
    if len(files_to_write) == 1:
        files_to_write[0].write(temporary / "model.safetensors")
        return
    weight_map = {}
    for number, piece in enumerate(files_to_write, 1):
        name = f"model-{number:05}-of-{len(files_to_write):05}.safetensors"
        piece.write(temporary / name)
        weight_map |= dict.fromkeys(piece.tensors, name)
    total = sum(tensor.nbytes for piece in files_to_write for tensor in piece.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

"""Checkpoints that are whole or absent, and the final model.

A checkpoint is written to a hidden temporary directory; every file is hashed and synced; ``manifest.json``
goes in last; the directory is renamed into place. Without a manifest a directory is no checkpoint. All
tensors are in safetensors files: nothing here ever unpickles.

    checkpoint-N/
      model.safetensors       trainable weights as fp32 masters, frozen ones in their dtype
      config.json, tokenizer  so that a checkpoint opens as a model, too
      optimizer.safetensors   optimizer state by parameter name
                              (large ones in several files with an index, as transformers names them)
      trainer_state.json      progress, history, and what the run must still agree with at resume
      manifest.json           bytes and sha256 of every file, and the sha256 of what it says itself
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flare.checkpoint.tensor_files import write_tensors
from flare.distributed.process_group import World, run_on_all_ranks, run_on_main_rank
from flare.errors import CheckpointError, EnvError, first_line
from flare.files import write_json
from flare.nope.config_json import write_config

FORMAT_VERSION = 2
"""Of manifests. Those of 1 have no hash of their own."""
NAME = re.compile(r"checkpoint-(\d+)")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that carries our manifest."""

    path: Path
    step: int

    def manifest(self) -> dict:
        return json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))

    def state(self) -> dict:
        return json.loads((self.path / "trainer_state.json").read_text(encoding="utf-8"))

    def verify(self) -> None:
        """Compare every file with the manifest, by size and sha256.

        Raises: CheckpointError naming the first file that differs.
        """
        files = self.listed_files()
        for name, (size, digest) in files.items():
            path = self.path / name
            if not path.is_file():
                raise CheckpointError(f"{self.path.name}: {name} is missing")
            if path.stat().st_size != size:
                raise CheckpointError(f"{self.path.name}: {name} has {path.stat().st_size} bytes instead of {size}")
            if sha256(path) != digest:
                raise CheckpointError(f"{self.path.name}: {name} is damaged (its sha256 differs)")
        foreign = sorted({path.name for path in self.path.glob("*.safetensors*")} - set(files))
        if foreign:  # a reader would take an index, and what it names, for ours
            raise CheckpointError(f"{self.path.name}: {foreign[0]} is not in its manifest")

    def listed_files(self) -> dict[str, tuple[int, str]]:
        """Name -> (bytes, sha256) of the manifest's files.

        Raises: CheckpointError for a manifest that is damaged, or that of another checkpoint.
        """
        try:
            manifest = self.manifest()
            files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
            has_hash = manifest["format_version"] != 1 or "sha256" in manifest
            is_damaged = has_hash and manifest["sha256"] != manifest_sha256(manifest)
            step = manifest["step"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path.name}: manifest.json cannot be read ({first_line(error)})") from error
        if is_damaged:
            raise CheckpointError(f"{self.path.name}: manifest.json is damaged (its sha256 differs)")
        if step != self.step:
            raise CheckpointError(f"{self.path.name}: manifest.json is that of step {step}")
        return files


def manifest_sha256(manifest: dict) -> str:
    """Hex digest of what a manifest says, but for that digest itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Directories with our name and our manifest, oldest first, by step number (never by date)."""
    if not directory.is_dir():
        return []
    found = []
    for path in directory.iterdir():
        match = NAME.fullmatch(path.name)
        if match and (path / "manifest.json").is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda c: c.step)


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are what its manifest says, and why newer ones were skipped."""
    skipped = []
    for candidate in reversed(list_checkpoints(directory)):
        try:
            candidate.verify()
        except CheckpointError as error:
            skipped.append(str(error))
        else:
            return candidate, skipped
    return None, skipped


def write_checkpoint(
    target: Path,
    state: dict[str, dict[str, torch.Tensor]],
    files: dict[str, Callable[[Path], None]],
    facts: dict,
    world: World,
) -> None:
    """Write a checkpoint whole or not at all. A collective.

    Args:
        target: ``.../checkpoint-<step>``.
        state: stem of the file names -> named tensors, which all ranks write together (see ``tensor_files``).
        files: name -> function that writes that file at the path it is given, on rank 0.
        facts: what the manifest says besides the files (step, tokens, stage, world size, ...).
    Raises: EnvError when the disk is full or the directory cannot be written; nothing is left behind.
    """
    part = target.with_name(f".tmp-{target.name}")

    def write() -> None:
        run_on_main_rank(world, lambda: _begin(part))
        written = [path for stem, tensors in state.items() for path in write_tensors(tensors, part, stem, world)]
        entries: dict[str, dict] = {}
        for sealed in run_on_all_ranks(world, lambda: {path.name: _seal(path) for path in written}):
            entries |= sealed
        run_on_main_rank(world, lambda: _commit(part, target, files, entries, facts))

    _whole_or_not(write, part, world)


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _seal(path: Path) -> dict:
    """The manifest's entry of a file that is on the disk for good."""
    _sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _commit(part: Path, target: Path, files: dict[str, Callable[[Path], None]], entries: dict, facts: dict) -> None:
    """Add the small files and the manifest, and give the directory its name."""
    for name, write in files.items():
        write(part / name)
    entries |= {path.name: _seal(path) for path in sorted(part.iterdir()) if path.name not in entries}
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": dict(sorted(entries.items()))}
    write_json(part / "manifest.json", manifest | {"sha256": manifest_sha256(manifest)})
    if target.exists():  # an older, damaged or unfinished one of the same step
        remove_checkpoint(target)
    os.rename(part, target)
    _sync(target.parent)


def _whole_or_not(write: Callable[[], None], part: Path, world: World) -> None:
    """Run a collective that writes into ``part``; when it fails, on all ranks alike, remove that.

    Raises: EnvError for what the disk refused, else what failed.
    """
    try:
        write()
    except (OSError, EnvError) as error:
        failure = _disk_error(part.parent, error)
        run_on_main_rank(world, lambda: shutil.rmtree(part, ignore_errors=True))
        raise failure from error


def _disk_error(directory: Path, error: OSError | EnvError) -> EnvError:
    free = shutil.disk_usage(directory).free if directory.exists() else 0
    return EnvError(
        f"cannot write to {directory}: {getattr(error, 'strerror', None) or error} ({free / 2**30:.2f} GiB free); "
        "earlier checkpoints are untouched; free some space and run the same command again"
    )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_temporary_directories(directory: Path) -> None:
    """Remove what a killed save left behind: our hidden temporary directories."""
    for path in directory.glob(".tmp-*") if directory.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint, manifest first: a half-deleted one must not look complete."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path)


def prune(directory: Path, limit: int | None, keep_steps: set[int | None]) -> None:
    """Keep the newest ``limit`` checkpoints, and those of ``keep_steps`` (just written, best) whatever their age."""
    if limit is None:
        return
    for old in list_checkpoints(directory)[:-limit]:
        if old.step not in keep_steps:
            remove_checkpoint(old.path)


def supersede_newer(directory: Path, step: int) -> list[str]:
    """Rename checkpoints beyond ``step`` to superseded-checkpoint-N: resuming an older one begins another branch,
    and the newest must not be taken for its end. Returns their names."""
    names = []
    for newer in list_checkpoints(directory):
        if newer.step > step:
            shutil.rmtree(directory / f"superseded-{newer.path.name}", ignore_errors=True)
            os.rename(newer.path, directory / f"superseded-{newer.path.name}")
            names.append(newer.path.name)
    return names


# -- tensors --------------------------------------------------------------------------------------


def model_tensors(causal_lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights by name, a tied one once, as they are: on their device, sharded or not."""
    return {name: p.detach() for name, p in causal_lm.named_parameters()}


def model_files(config: dict, tokenizer_dir: Path) -> dict[str, Callable[[Path], None]]:
    """Writers for what makes a directory with weights a model: config, modelling code, tokenizer."""
    files = {"config.json": lambda path: write_config(config, path.parent)}
    for file in TOKENIZER_FILES:
        if (tokenizer_dir / file).is_file():
            files[file] = lambda path, source=tokenizer_dir / file: shutil.copyfile(source, path)
    return files


def export_model(
    target: Path, weights: Callable[[Path], list[Path]], files: dict[str, Callable[[Path], None]], world: World
) -> None:
    """Write a model directory whole or not at all, replacing an earlier one. A collective.

    Args:
        weights: a collective that writes the weights into a directory; returns the files that this rank wrote.
        files: as in ``write_checkpoint``; they are written after the weights.
    Raises: EnvError when the disk is full.
    """
    part = target.with_name(f".tmp-{target.name}")

    def write() -> None:
        run_on_main_rank(world, lambda: _begin(part))
        written = weights(part)
        run_on_all_ranks(world, lambda: [_sync(path) for path in written])
        run_on_main_rank(world, lambda: _replace(part, target, files))

    _whole_or_not(write, part, world)


def _replace(part: Path, target: Path, files: dict[str, Callable[[Path], None]]) -> None:
    old = target.with_name(f".tmp-old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    for name, write in files.items():
        write(part / name)
        _sync(part / name)
    if target.exists():
        os.rename(target, old)
    os.rename(part, target)
    shutil.rmtree(old, ignore_errors=True)

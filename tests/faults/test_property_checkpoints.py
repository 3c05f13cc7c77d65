"""Checkpoint directories in which files were removed, cut, changed, swapped or made up.

Whatever counts as a complete checkpoint is, bit for bit, what was written at that step; what is not complete is named
in one line; nothing ends in another kind of error.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flare.checkpoint import __main__ as checkpoint_command
from flare.checkpoint.directory import (
    Checkpoint,
    list_checkpoints,
    newest_valid,
    prune,
    remove_temporary_directories,
    write_checkpoint,
)
from flare.checkpoint.tensor_files import TensorReader
from flare.distributed.process_group import World
from flare.errors import CheckpointError
from flare.files import write_json
from flare.run.experiment import Experiment

STEPS = (2, 4)
Files = dict[str, bytes]


class Written(dict[int, Files]):
    """Step -> the files of its checkpoint."""

    def __repr__(self) -> str:  # a failure that hypothesis reports stays readable
        return f"Written({list(self)})"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Checkpoints as Flare writes them."""
    directory, world = tmp_path_factory.mktemp("written"), World(0, 0, 1, torch.device("cpu"))
    for step in STEPS:
        torch.manual_seed(step)
        state = {"model": {"w": torch.randn(3, 4), "b": torch.randn(4)}, "optimizer": {"w.exp_avg": torch.randn(3, 4)}}
        contents = {"trainer_state.json": {"global_batch_size": 2, "step": step}, "config.json": {"hidden_size": 4}}
        files = {name: lambda path, content=content: write_json(path, content) for name, content in contents.items()}
        facts = {"step": step, "tokens": 64 * step, "stage": 1, "world_size": 1}
        write_checkpoint(directory / f"checkpoint-{step}", state, files, facts, world)
    return Written({step: files_of(directory / f"checkpoint-{step}") for step in STEPS})


def files_of(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.glob("*") if path.is_file()}


# -- damages: each changes the directory checkpoints/ in place, with numbers that hypothesis draws ----------------


def chosen(directory: Path, number: int) -> Path | None:
    """One of the files of all checkpoints."""
    files = sorted(path for path in directory.glob("checkpoint-*/*") if path.is_file())
    return files[number % len(files)] if files else None


def remove(path: Path, _number: int) -> None:
    path.unlink()


def cut(path: Path, number: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: number % (len(content) + 1)])


def change_a_byte(path: Path, number: int) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[number % len(content)] ^= 1 + number // 7 % 255
    path.write_bytes(content)


def append(path: Path, number: int) -> None:
    path.write_bytes(path.read_bytes() + bytes([number % 256]))


def swap_with_another(path: Path, number: int) -> None:
    other = chosen(path.parent.parent, number)
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


def move_to_the_other(path: Path, _number: int) -> None:
    for other in path.parent.parent.iterdir():
        if other != path.parent and not (other / path.name).is_dir():
            (other / path.name).write_bytes(path.read_bytes())


def make_a_directory_of_it(path: Path, _number: int) -> None:
    path.unlink()
    path.mkdir()


def make_a_dangling_link_of_it(path: Path, _number: int) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def rename_the_checkpoint(path: Path, number: int) -> None:
    target = path.parent.with_name(f"checkpoint-{number % 9}")
    if not target.exists():
        path.parent.rename(target)


def drop_from_the_manifest(path: Path, number: int) -> None:
    manifest = path.parent / "manifest.json"
    with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
        content = json.loads(manifest.read_bytes())
        if names := sorted(content["files"]):
            del content["files"][names[number % len(names)]]
        manifest.write_text(json.dumps(content))


def change_a_fact_of_the_manifest(path: Path, number: int) -> None:
    manifest = path.parent / "manifest.json"
    with suppress(ValueError, OSError, TypeError, AttributeError):
        content = json.loads(manifest.read_bytes())
        if names := sorted(content):
            content[names[number % len(names)]] = ([], None, {}, number, "x", {"a": 1}, 1)[number // 11 % 7]
        manifest.write_text(json.dumps(content))


def add_weights_of_another_kind(path: Path, number: int) -> None:
    """What a reader would prefer to what we wrote."""
    stem = ("model", "optimizer")[number % 2]
    index = {"weight_map": {"w": f"{stem}-00001-of-00001.safetensors"}}
    added = {f"{stem}-00001-of-00001.safetensors": path.read_bytes()}
    added[f"{stem}.safetensors.index.json"] = json.dumps(index).encode()
    for name, content in added.items():
        if not (path.parent / name).is_dir():
            (path.parent / name).write_bytes(content)


def add_a_note(path: Path, number: int) -> None:
    note = path.parent / f"note{number % 3}.txt"
    if not note.is_dir():
        note.write_text("mine")


DAMAGES = (
    remove, cut, change_a_byte, append, swap_with_another, move_to_the_other, make_a_directory_of_it,
    make_a_dangling_link_of_it, rename_the_checkpoint, drop_from_the_manifest, change_a_fact_of_the_manifest,
    add_weights_of_another_kind, add_a_note,
)  # fmt: skip
NUMBERS = st.integers(0, 10**6)
HARM = st.lists(st.tuples(st.sampled_from(DAMAGES), NUMBERS, NUMBERS), max_size=4)


def laid_out(root: Path, written: Written, harm: list[tuple[Callable, int, int]]) -> Path:
    """checkpoints/ of an experiment, harmed."""
    shutil.rmtree(root, ignore_errors=True)
    for step, files in written.items():
        directory = root / "checkpoints" / f"checkpoint-{step}"
        directory.mkdir(parents=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)
    for damage, which, number in harm:
        path = chosen(root / "checkpoints", which)
        if path is not None:
            damage(path, number)
    return root / "checkpoints"


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory, written: Written) -> Callable[[list], Path]:
    """Copies the written checkpoints, damages them, and returns their directory."""
    root = tmp_path_factory.getbasetemp() / "harmed"
    return lambda harm: laid_out(root, written, harm)


def is_as_written(directory: Path, original: Files) -> bool:
    """Bit for bit; what the user added stays out of it, and in the manifest the space between the words."""
    now = files_of(directory)
    same = all(now.get(name) == content for name, content in original.items() if name != "manifest.json")
    try:
        return same and json.loads(now.get("manifest.json", b"")) == json.loads(original["manifest.json"])
    except ValueError:
        return False


def has_foreign_weights(directory: Path, original: Files) -> bool:
    return any(path.name not in original for path in directory.glob("*.safetensors*"))


@given(HARM)
def test_what_loads_is_bit_for_bit_what_was_written(
    harmed: Callable[[list], Path], written: Written, harm: list
) -> None:
    directory = harmed(harm)
    complete = [step for step in STEPS if is_as_written(directory / f"checkpoint-{step}", written[step])]
    newest, skipped = newest_valid(directory)
    assert all(len(reason.splitlines()) == 1 for reason in skipped)
    if newest is not None:
        assert newest.step in complete
        for stem, names in (("model", {"w", "b"}), ("optimizer", {"w.exp_avg"})):
            reader = TensorReader.of_state(newest.path, stem)
            assert reader.names() == names
            torch.manual_seed(newest.step)
            expected = {"w": torch.randn(3, 4), "b": torch.randn(4), "w.exp_avg": torch.randn(3, 4)}
            for name in names:
                reader.copy_into(name, found := torch.empty_like(expected[name]))
                assert torch.equal(found, expected[name])
    loadable = [step for step in complete if not has_foreign_weights(directory / f"checkpoint-{step}", written[step])]
    assert (newest and newest.step) == max(loadable, default=None)  # a complete one is never skipped


@given(HARM)
def test_the_tools_report_what_is_complete_and_change_nothing(harmed: Callable[[list], Path], harm: list) -> None:
    directory = harmed(harm)
    root = directory.parent
    before = {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}
    assert run_command("list", root) == (0, "")
    good = [c.step for c in list_checkpoints(directory) if verified(c)]
    code, error = run_command("verify", root)
    assert (code == 0) == (len(good) == len(list(directory.glob("checkpoint-*"))))
    assert len(error.splitlines()) == (code != 0)
    Experiment(root).saved_global_batch_size()
    remove_temporary_directories(directory)
    assert {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")} == before
    prune(directory, 1, set(good[-1:]))
    assert all(verified(Checkpoint(directory / f"checkpoint-{step}", step)) for step in good[-1:])


def run_command(command: str, root: Path) -> tuple[int, str]:
    """(exit code, error) of ``python -m flare.checkpoint``; its table goes nowhere."""
    with redirect_stdout(StringIO()):
        try:
            return checkpoint_command.main([command, str(root)]), ""
        except CheckpointError as error:
            return error.exit_code, str(error)


def verified(checkpoint: Checkpoint) -> bool:
    try:
        checkpoint.verify()
    except CheckpointError:
        return False
    return True


RECORDS = ("training_metrics.json", "final_model/config.json", "stage1/final_model/config.json")
KEYS = st.sampled_from(("stages", "1", "flare", "stage", "status", "current_stage"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(st.sampled_from(RECORDS), st.one_of(JSON.map(json.dumps).map(str.encode), st.binary(max_size=40)))
)
def test_records_that_are_invalid_never_stop_a_start(
    tmp_path_factory: pytest.TempPathFactory, records: dict[str, bytes]
) -> None:
    """What an experiment reads of itself before anything else."""
    root = tmp_path_factory.getbasetemp() / "records"
    shutil.rmtree(root, ignore_errors=True)
    for name, content in records.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    experiment = Experiment(root)
    assert experiment.recorded_stage() in (None, 1, 2)
    for stage in (1, 2):
        assert experiment.final_model_of(stage) in (None, root / "final_model", root / "stage1" / "final_model")
    assert isinstance(experiment.read_metrics(), dict)

"""Faults that a run injects into itself. Each is called once, before the script's main; none is part of Flare.

Python's audit hooks report every file that the run opens, renames or removes, so that a run can be killed at each
of these moments, wherever in the code it is.
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile")


def die_at(number: int, root: str) -> None:
    """SIGKILL this process before its ``number``-th file event below ``root``; never, when that is 0.

    What is in a temporary directory then loses the second half of its newest file: data that was not synced.
    The events up to there are in ``root``.events, a line each.
    """
    Path(root).parent.mkdir(parents=True, exist_ok=True)
    record = open(f"{root}.events", "w")  # noqa: SIM115 (until the process ends)
    count, in_our_tree = 0, False

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, in_our_tree
        if event not in FILE_EVENTS:
            return
        paths = [os.fspath(a) for a in arguments[:2] if isinstance(a, str | os.PathLike)]
        ours = [p for p in paths if p.startswith(f"{root}/")]
        if event == "shutil.rmtree":
            in_our_tree = bool(ours)
        by_descriptor = event in ("os.remove", "os.rmdir") and arguments[1] != -1  # rmtree's own calls
        if not ours and not (by_descriptor and in_our_tree):
            return
        count += 1
        if count == number:
            _halve_newest(Path(root))
            os.kill(os.getpid(), signal.SIGKILL)
        record.write(f"{event} {' '.join(ours)}\n")
        record.flush()

    sys.addaudithook(hook)


def _halve_newest(root: Path) -> None:
    files = [f for part in root.rglob(".tmp-*") if part.is_dir() for f in part.iterdir()]
    if files:
        newest = max(files, key=lambda f: f.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)


def die_at_step(step: int) -> None:
    """SIGKILL this process in the middle of a step: the backward pass is done, the update is not."""
    from flare.train.trainer import Trainer

    learning_rate = Trainer._learning_rate

    def dying(trainer: Trainer) -> float:
        if trainer.train_state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return learning_rate(trainer)

    Trainer._learning_rate = dying


def record_rows(path: str, then: list | None = None) -> None:
    """Append the rows of each step to a file, a line of JSON each; then another fault."""
    from flare.data.order import RowOrder

    rows_of = RowOrder.rows

    def recording(order: RowOrder, first: int, last: int) -> object:
        rows = rows_of(order, first, last)
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([first, rows.tolist()]) + "\n")
        return rows

    RowOrder.rows = recording
    if then:
        globals()[then[0]](*then[1:])


def slow_save(seconds: float) -> None:
    """Each checkpoint takes this long."""
    from flare.train.saver import Saver

    checkpoint = Saver.checkpoint

    def slow(saver: Saver, train_state: object) -> None:
        if saver.world.is_main:
            time.sleep(seconds)
        checkpoint(saver, train_state)

    Saver.checkpoint = slow


def slow_evaluation(seconds: float) -> None:
    """Each evaluation takes this long, on all ranks."""
    from flare.train import trainer

    evaluate_rows = trainer.evaluate_rows

    def slow(*arguments: object) -> tuple[float, float]:
        time.sleep(seconds)
        return evaluate_rows(*arguments)

    trainer.evaluate_rows = slow


def hang_in_step(step: int, rank: int = 0) -> None:
    """This rank never finishes reading its rows."""
    from flare.data.order import RowOrder

    rows_of = RowOrder.rows

    def hanging(order: RowOrder, first: int, last: int) -> object:
        while first // (last - first) + 1 == step and int(os.environ.get("RANK", 0)) == rank:
            time.sleep(0.1)
        return rows_of(order, first, last)

    RowOrder.rows = hanging


def pause_in_save(step: int, marker: str, seconds: float) -> None:
    """The checkpoint of this step waits when its tensors are written and its manifest is not; ``marker`` says so."""
    from flare.checkpoint import directory

    commit = directory._commit

    def pausing(part: Path, *arguments: object) -> None:
        if part.name == f".tmp-checkpoint-{step}":
            Path(marker).touch()
            time.sleep(seconds)
        commit(part, *arguments)

    directory._commit = pausing


def die_in_save(step: int) -> None:
    """SIGKILL this process when the tensors of this step's checkpoint are written and its manifest is not."""
    from flare.checkpoint import directory

    commit = directory._commit

    def dying(part: Path, *arguments: object) -> None:
        if part.name == f".tmp-checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        commit(part, *arguments)

    directory._commit = dying


def limit_memory(module: str, function: str, mib: int) -> None:
    """From the first call of a function (``Class.method``) on, the process can allocate only this much more memory."""
    owner_name, name = function.split(".")
    owner = getattr(importlib.import_module(module), owner_name)
    limited = getattr(owner, name)

    def limiting(*arguments: object) -> object:
        setattr(owner, name, limited)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + mib * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        return limited(*arguments)

    setattr(owner, name, limiting)


def in_rank(rank: int, *fault: object) -> None:
    """Another fault, in one worker only (after ``in_workers``)."""
    if int(os.environ["RANK"]) == rank:
        globals()[fault[0]](*fault[1:])


def in_workers(*fault: object) -> None:
    """Another fault, in every worker that this launcher starts."""
    import train_qwen_multi_gpu

    os.environ["FLARE_TEST_FAULT"] = json.dumps(fault)
    train_qwen_multi_gpu.SCRIPT = Path(__file__).with_name("worker.py")


def set_umask(umask: int) -> None:
    os.umask(umask)


def poison_gradients(step: int) -> None:
    """The gradients of one step (from 1) are infinite, as those of a broken kernel."""
    from flare.distributed import ddp

    clip, calls = ddp.clip_gradients, 0

    def poisoned(parameters: list, max_norm: float) -> object:
        nonlocal calls
        calls += 1
        if calls == step:
            parameters[0].grad.fill_(float("inf"))
        return clip(parameters, max_norm)

    ddp.clip_gradients = poisoned

"""Building a token cache: the bytes do not depend on the number of workers or on interruptions."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flare.child_process import child_environment
from flare.data.sources import base as sources_module
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.token_cache.build import Builder, PieceSchedule, build_token_cache
from flare.data.token_cache.cache import TokenCache, TokenSettings
from flare.errors import DataError
from flare.nope.load import load_tokenizer
from tests.conftest import write_corpus
from tests.data.build_tokens import FileByFile
from tests.processes import REPO, script_environment


def cache_of(path: Path, base: Path, cache_dir: Path, **settings: object) -> TokenCache:
    source = open_source(SourceSpec(str(path)), cache_dir)
    return build_token_cache(source, load_tokenizer(base), cache_dir, TokenSettings(**settings))


def build(directory: Path, base: Path, cache_dir: Path, workers: int, **settings: object) -> TokenCache:
    settings = TokenSettings(num_workers=workers, **settings)
    return build_token_cache(FileByFile(directory), load_tokenizer(base), cache_dir, settings)


def start_build(directory: Path, base: Path, cache_dir: Path, workers: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "tests.data.build_tokens",
        str(directory),
        str(base),
        str(cache_dir),
        str(workers),
    ]
    return subprocess.Popen(command, cwd=REPO, env=script_environment(), stderr=subprocess.PIPE, text=True)


def contents(cache: TokenCache) -> list[bytes]:
    return [(cache.directory / name).read_bytes() for name in ("tokens.bin", "offsets.npy", "hashes.npy", "meta.json")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six files with 1 to 43 rows each. Three of them have a row that is not text."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(6):
        file = write_corpus(directory / f"{number}.jsonl", 1 + 8 * number, seed=number)
        if number % 2:
            with open(file, "a") as stream:
                stream.write('{"text": null}\n{"text": "the last"}\n')
    return directory


def wait_for_parts(cache_dir: Path, number: int, process: subprocess.Popen) -> Path:
    deadline = time.monotonic() + 60
    while len(list(cache_dir.glob(".tokens-*.parts/0*/meta.json"))) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return next(cache_dir.glob(".tokens-*.parts"))


def replace_by_pipe(file: Path) -> bytes:
    """Replace a file by a named pipe, which blocks its reader. Returns the content."""
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    return content


def test_bytes_do_not_depend_on_the_number_of_workers(folder: Path, base: Path, tmp_path: Path) -> None:
    expected_bytes = contents(build(folder, base, tmp_path / "c1", 1, max_bad_rows=0.1))
    for workers in (2, 3):
        assert contents(build(folder, base, tmp_path / f"c{workers}", workers, max_bad_rows=0.1)) == expected_bytes
    meta = json.loads(expected_bytes[-1])
    places = [Path(place).name for place in meta["first_bad_rows"]]
    assert (meta["bad_rows"], places) == (3, ["1.jsonl:10 is null", "3.jsonl:26 is null", "5.jsonl:42 is null"])


@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_bytes_do_not_depend_on_how_a_file_is_cut(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A file of JSON lines as one piece and cut into several has the same cache and the same names of bad rows."""
    one = tmp_path / f"one{kind}"
    one.write_bytes(b"".join(file.read_bytes() for file in sorted(folder.glob("*.jsonl"))))
    expected_bytes = contents(cache_of(one, base, tmp_path / "expected_bytes", max_bad_rows=0.5))
    for most_bytes, workers in ((1, 1), (700, 2)):
        monkeypatch.setattr(sources_module, "MIN_PIECE_BYTES", most_bytes)
        monkeypatch.setattr(sources_module, "PIECE_BYTES", most_bytes)
        assert len(open_source(SourceSpec(str(one)), tmp_path / f"c{most_bytes}").pieces()) > 5
        cut = cache_of(one, base, tmp_path / f"c{most_bytes}", max_bad_rows=0.5, num_workers=workers)
        assert contents(cut) == expected_bytes


@pytest.mark.parametrize("size", [1, 9, 10, 11, 40, 1000])
def test_dataset_size_counts_rows_across_pieces(folder: Path, base: Path, tmp_path: Path, size: int) -> None:
    """The same first rows, good and bad, as in a single file with all rows."""
    one = tmp_path / "one.jsonl"
    one.write_bytes(b"".join(file.read_bytes() for file in sorted(folder.glob("*.jsonl"))))
    expected = cache_of(one, base, tmp_path / "a", dataset_size=size, max_bad_rows=0.5)
    cache = build(folder, base, tmp_path / "b", 1, dataset_size=size, max_bad_rows=0.5)
    assert contents(cache)[:3] == contents(expected)[:3]
    assert cache.meta["bad_rows"] == expected.meta["bad_rows"]


def test_piece_schedule_by_hand() -> None:
    """Pieces of 4, 3, 5 and 9 rows; --dataset_size is 8."""
    schedule = PieceSchedule(4, 8)
    assert [schedule.next(), schedule.next()] == [(0, 8), (1, 8)]
    schedule.finish(1, 3)
    assert schedule.next() == (2, 5)  # before it there are at least three rows, and probably six
    assert schedule.next() is None  # probably nine rows before the last piece
    schedule.finish(0, 4)
    assert schedule.needed() == [(0, 8), (1, 4)]
    schedule.finish(2, 5)
    assert schedule.needed() == [(0, 8), (1, 4), (2, 1)]
    assert schedule.next() is None


def test_too_many_bad_rows_end_the_build_before_the_last_row(folder: Path, base: Path, tmp_path: Path) -> None:
    (folder / "0.jsonl").write_text('{"text": null}\n' * 5)
    replace_by_pipe(folder / "1.jsonl")  # reading it would block forever
    with pytest.raises(DataError, match=r"5 of 40 rows .*0.jsonl:1 is null"):
        build(folder, base, tmp_path / "c", 1, dataset_size=40, max_bad_rows=0.1)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_killed_build_is_continued_by_the_next(folder: Path, base: Path, tmp_path: Path, seed: int) -> None:
    """SIGKILL after a random number of parts. The next start tokenises only the others, with equal bytes."""
    expected_bytes = contents(build(folder, base, tmp_path / "expected_bytes", 1, max_bad_rows=0.1))
    done = random.Random(seed).randint(1, 4)
    blocked = folder / f"{done}.jsonl"
    content = replace_by_pipe(blocked)
    process = start_build(folder, base, tmp_path / "c", 1)
    work = wait_for_parts(tmp_path / "c", done, process)
    process.kill()
    process.communicate()
    made = {path: path.stat().st_mtime_ns for path in work.glob("0*/meta.json")}
    assert len(made) == done
    damaged = work / "00000000" / "tokens.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2] + b"\0\1")
    blocked.unlink()
    blocked.write_bytes(content)
    builder = Builder(
        FileByFile(folder), load_tokenizer(base), work.with_name(work.name.split(".")[1]),
        TokenSettings(max_bad_rows=0.1, num_workers=1),
    )  # fmt: skip
    builder.find_finished_parts()
    assert sorted(builder.schedule.rows) == list(range(1, done))  # all except the damaged one
    assert contents(build(folder, base, tmp_path / "c", 1, max_bad_rows=0.1)) == expected_bytes
    assert not work.exists()


def test_a_killed_worker_is_an_error_that_keeps_the_finished_parts(folder: Path, base: Path, tmp_path: Path) -> None:
    replace_by_pipe(folder / "4.jsonl")
    process = start_build(folder, base, tmp_path / "c", 2)
    work = wait_for_parts(tmp_path / "c", 5, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    busy = next(work.glob(".00000004.*.tmp")).name.split(".")[2]  # the part that waits for the pipe
    assert busy in workers
    os.kill(int(busy), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 4
    assert f"error: a tokenising worker (pid {busy}) was ended by SIGKILL" in errors
    assert errors.count("\n") == 1
    assert len(list(work.glob("0*/meta.json"))) == 5
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_workers_end_with_a_killed_builder(folder: Path, base: Path, tmp_path: Path) -> None:
    replace_by_pipe(folder / "4.jsonl")
    process = start_build(folder, base, tmp_path / "c", 2)
    wait_for_parts(tmp_path / "c", 5, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: str) -> bool:
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_workers_request_huge_pages_in_addition_to_the_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in (
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ):
        monkeypatch.setenv("GLIBC_TUNABLES", before)
        assert child_environment(1)["GLIBC_TUNABLES"] == after


def test_two_builders_at_once_build_once(folder: Path, base: Path, tmp_path: Path) -> None:
    for file in folder.glob("[135].jsonl"):
        file.unlink()
    runs = [start_build(folder, base, tmp_path / "c", 2) for _ in range(2)]
    errors = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], errors
    assert sum(err.count("tokenised") for err in errors) == 1
    assert len(list((tmp_path / "c").glob("tokens-*"))) == 1
    assert not any("TOKENIZERS_PARALLELISM" in err for err in errors)


def test_waiting_for_another_builder_is_reported(folder: Path, base: Path, tmp_path: Path) -> None:
    directory = build(folder, base, tmp_path / "c", 1, max_bad_rows=0.1).directory
    shutil.rmtree(directory)
    with open(directory.with_name(f".{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start_build(folder, base, tmp_path / "c", 1)
        assert f"waits for another process that builds the token cache {directory}" in process.stderr.readline()
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert TokenCache(directory).is_complete

"""How much a start with a finished token cache reads, and the progress bar of a start that tokenises."""

import fcntl
import gzip
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from flare.data.sources import base, file_hashes
from flare.data.sources.base import SourceSpec
from flare.data.sources.file_hashes import facts_of, read_facts
from flare.data.sources.files import COMPRESSION_RATIO
from flare.data.sources.open import open_source
from flare.data.token_cache import progress_bar
from flare.data.token_cache.progress_bar import TokenProgress
from tests.conftest import write_corpus
from tests.data.test_token_cache import cache_of
from tests.processes import REPO, script_environment


def bytes_read() -> int:
    """Bytes that this process has read so far, from disk or from the page cache."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """8 MB in 40 documents, much more than a start reads from other files."""
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} " + "layer " * 35_000}) + "\n" for n in range(40)))
    return file


def cost(file: Path, base: Path, cache_dir: Path) -> float:
    """Bytes read by a start with a finished cache, divided by the file's size."""
    before = bytes_read()
    cache_of(file, base, cache_dir)
    return (bytes_read() - before) / file.stat().st_size


def test_cached_starts_read_the_data_once_for_its_hash_and_then_never(
    large: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_SEC", 1e9)  # the file is too new for a note
    cache_of(large, base, tmp_path / "c")
    assert 1.0 <= cost(large, base, tmp_path / "c") < 1.2
    monkeypatch.setattr(file_hashes, "SETTLED_SEC", -60.0)
    assert 1.0 <= cost(large, base, tmp_path / "c") < 1.2
    assert cost(large, base, tmp_path / "c") < 0.2
    large.touch()
    assert 1.0 <= cost(large, base, tmp_path / "c") < 1.2
    assert cost(large, base, tmp_path / "c") < 0.2


def test_a_note_is_valid_only_for_the_unchanged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_SEC", -60.0)
    monkeypatch.setattr(base, "MIN_PIECE_BYTES", 100)
    files = [write_corpus(tmp_path / f"{n}.jsonl", 20, seed=n) for n in range(2)]
    expected = [read_facts(file) for file in files]
    assert expected[0].cuts
    assert facts_of(files, tmp_path, tmp_path) == expected
    (memo,) = tmp_path.glob(".facts-*.json")
    assert facts_of(files, tmp_path, tmp_path) == expected
    stat, content = files[0].stat(), files[0].read_bytes()
    files[0].write_bytes(content.replace(b" the ", b" teh ", 1))  # the same size
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and timestamps
    changed = facts_of(files, tmp_path, tmp_path)
    assert changed[0].sha256 != expected[0].sha256
    assert changed[1] == expected[1]
    for damage in (b"{", b"[]", b'{"files": 5}'):
        memo.write_bytes(damage)
        assert facts_of(files, tmp_path, tmp_path) == changed


def test_a_new_file_does_not_cause_others_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the files are named by a glob. Hosts that number a network disk differently share the notes."""
    read: list[Path] = []
    monkeypatch.setattr(file_hashes, "SETTLED_SEC", -60.0)
    monkeypatch.setattr(file_hashes, "read_facts", lambda file: read.append(file) or read_facts(file))
    data = tmp_path / "data"
    data.mkdir()
    for name in "ab":
        write_corpus(data / f"{name}.jsonl", 5, seed=ord(name))

    def hashed(name: str) -> list[str]:
        read.clear()
        open_source(SourceSpec(name), tmp_path / "cache").fingerprint()
        return [file.name for file in read]

    assert hashed(str(data)) == ["a.jsonl", "b.jsonl"]
    write_corpus(data / "c.jsonl", 5)
    assert hashed(str(data)) == ["c.jsonl"]
    assert hashed(str(data / "[a-b].jsonl")) == []
    (data / "b.jsonl").unlink()
    write_corpus(data / "d.jsonl", 5, seed=4)
    assert hashed(str(data)) == ["d.jsonl"]
    (memo,) = (tmp_path / "cache").glob(".facts-*.json")
    assert [Path(name).name for name in json.loads(memo.read_text())["files"]] == ["a.jsonl", "c.jsonl", "d.jsonl"]
    stat = os.stat
    monkeypatch.setattr(file_hashes.os, "stat", lambda file: os.stat_result([*stat(file)[:2], 99, *stat(file)[3:]]))
    assert file_hashes._state(data / "a.jsonl")[0] == stat(data / "a.jsonl").st_ino


def test_a_file_that_was_just_written_gets_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hashes, "SETTLED_SEC", 1e9)
    facts_of([write_corpus(tmp_path / "x.jsonl", 5)], tmp_path, tmp_path)
    assert not list(tmp_path.glob(".facts-*.json"))


# -- progress --------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_log_line_with_tokens_per_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([100.0, 110.0, 110.0, 140.0, 140.0, 140.0, 150.0, 150.0, 150.0, 150.0])
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress_bar.log, "propagate", True)
    monkeypatch.setattr(progress_bar.sys.stderr, "isatty", lambda: False, raising=False)
    caplog.set_level(logging.INFO, progress_bar.log.name)
    with TokenProgress([2000, 2000, 3000, 1000], done=[0]) as bar:
        bar.report(1, 1000, 1000)
        assert not caplog.messages  # only ten seconds have passed
        bar.report(1, 3000, 40)
    assert caplog.messages == ["tokenising: 38% of the data, 4,000 tokens, 100 tokens/s"]
    bar.report(1, 1, 5000)  # more text than the size says
    bar.finish(1)
    assert bar.share == 0.5


def test_expected_bytes_of_a_piece(tmp_path: Path) -> None:
    """A .csv is one piece of any size. So is a compressed file, whose text size is estimated."""
    (tmp_path / "d").mkdir()
    lines = write_corpus(tmp_path / "d" / "a.jsonl", 20).stat().st_size
    (tmp_path / "d" / "b.csv").write_text("text\n" + "word " * 2**20 + "\n")
    table = (tmp_path / "d" / "b.csv").stat().st_size
    (tmp_path / "d" / "c.txt.gz").write_bytes(gzip.compress(b"word"))
    packed = (tmp_path / "d" / "c.txt.gz").stat().st_size
    pieces = open_source(SourceSpec(str(tmp_path / "d")), tmp_path / "c").pieces()
    assert [piece.expected_bytes for piece in pieces] == [lines, table, COMPRESSION_RATIO * packed]


def test_progress_on_a_terminal_is_a_bar_with_tokens_per_second(tmp_path: Path, base: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        write_corpus(tmp_path / "corpus" / f"{number}.jsonl", 30, seed=number)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    command = [sys.executable, "-m", "tests.data.build_tokens", tmp_path / "corpus", base, tmp_path / "c", "1"]
    process = subprocess.Popen(
        list(map(str, command)), cwd=REPO, env=script_environment(), stderr=terminal, stdout=subprocess.DEVNULL
    )
    os.close(terminal)
    shown = b""
    try:
        while block := os.read(main, 4096):
            shown += block
    except OSError:  # the terminal is closed
        pass
    os.close(main)
    assert process.wait(timeout=60) == 0
    assert b"tokenising:  33%|" in shown
    assert b"tokens/s" in shown

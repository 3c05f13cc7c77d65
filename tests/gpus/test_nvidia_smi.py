"""The query of nvidia-smi: every field, and a one-line error for everything that can go wrong."""

import os
import re
import select

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flare.errors import EnvError, FlareError
from flare.gpus.__main__ import format_table
from flare.gpus.nvidia_smi import Gpu, query_gpus, run_nvidia_smi
from flare.gpus.selection import (
    GpuRequest,
    list_gpus,
    select_gpus,
)
from tests.fake_nvidia_smi import gpu_uuid, install_raw, mig_uuid


def test_one_call_reads_every_field_of_the_guides_server(server):
    fake = server("guide")
    gpus = query_gpus()
    assert len(fake.calls) == 1
    assert len(gpus) == 8
    assert gpus[5] == Gpu(5, "NVIDIA A40", gpu_uuid(5), 46068, 4, "570.124.06")
    assert gpus[0].memory_free_mib == 81916
    assert list_gpus(gpus) == "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"


def test_unknown_memory_is_none_and_the_gpu_is_selected_with_a_note(choose):
    selection = choose("not_available")
    assert [(g.memory_total_mib, g.memory_used_mib, g.memory_free_mib) for g in selection.gpus] == [
        (None, None, None),
        (46068, None, None),
        (46068, None, None),
    ]
    assert [note for note in selection.notes if "GPU 0" in note and "memory" in note]


def test_gpu_name_in_gbk_bytes_does_not_stop_the_query(server):
    server("gbk_name")
    (gpu,) = query_gpus()
    assert gpu.name.endswith("A40")


def test_corrupted_inforom_warning_and_its_exit_code_leave_the_gpu_usable(server):
    server("inforom")
    assert [gpu.name for gpu in query_gpus()] == ["NVIDIA A40"]


@pytest.mark.parametrize(
    ("mode", "named"),
    [
        ("exit9", "exit code 9.*couldn't communicate with the NVIDIA driver"),
        ("empty", "printed nothing"),
        ("rubbish", "Segmentation fault"),
        ("gbk", "did not print a list of GPUs"),
    ],
)
def test_bad_nvidia_smi_is_one_line_that_names_the_problem(server, mode, named):
    server(mode)
    with pytest.raises(EnvError, match=named) as caught:
        query_gpus()
    assert "\n" not in str(caught.value)
    assert "nvidia-smi" in str(caught.value)


def test_one_broken_line_among_good_ones_is_refused_and_shown(tmp_path, monkeypatch):
    lost = "Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost."
    rows = f"0, NVIDIA A40, GPU-0, 46068, 4, 570\n{lost}\n"
    fake = install_raw(tmp_path / "bin", rows.encode())
    monkeypatch.setenv("PATH", f"{fake.directory}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(EnvError, match=re.escape(lost)):
        query_gpus()


def test_same_index_twice_is_refused(tmp_path, monkeypatch):
    fake = install_raw(tmp_path / "bin", b"0, NVIDIA A40, GPU-0, 46068, 4, 570\n" * 2)
    monkeypatch.setenv("PATH", f"{fake.directory}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(EnvError, match="did not print a list"):
        query_gpus()


def test_missing_nvidia_smi_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvError, match="nvidia-smi not found on PATH"):
        query_gpus()


def test_nvidia_smi_that_cannot_be_executed_is_named(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_bytes(b"\x7fELF cut off")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvError, match="nvidia-smi cannot be started"):
        query_gpus()


def test_hanging_nvidia_smi_and_its_child_are_killed(server, tmp_path):
    alive = tmp_path / "bin" / "alive"
    alive.parent.mkdir()
    os.mkfifo(alive)
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        server("hang")
        with pytest.raises(EnvError, match="nvidia-smi hangs: no answer in 2 s"):
            query_gpus(timeout_sec=2)
        assert os.read(reader, 100) == b"started\n"  # both ran, and held the FIFO open
        # End of file comes when the last holder is gone. 30 s: only a child that lives on takes that long.
        assert select.select([reader], [], [], 30)[0], "the child of nvidia-smi is still running"
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


def mostly(good: st.SearchStrategy, odd: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 7).flatmap(lambda dice: odd if dice == 0 else good)


ROWS = st.lists(
    st.tuples(
        mostly(st.integers(0, 9).map(str), st.one_of(st.just("-1"), st.text(max_size=6))),
        mostly(st.just("NVIDIA A40"), st.text(max_size=12)),
        mostly(st.sampled_from(["GPU-1", "GPU-2"]), st.just("")),
        mostly(st.sampled_from(["81920", "0", "[N/A]"]), st.sampled_from(["-5", "1e3", "²", "9" * 5000])),
        mostly(st.sampled_from(["0", "99999", "[Not Supported]", "N/A"]), st.sampled_from(["[", "٣", ""])),
        st.text(max_size=5),
    ).map(", ".join),
    min_size=1,
    max_size=3,
).map(lambda rows: "\n".join(rows).encode("utf-8", errors="surrogatepass"))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(output=mostly(ROWS, st.binary(max_size=200)), exit_code=mostly(st.just(0), st.sampled_from([1, 14, 255])))
def test_random_output_returns_gpus_or_raises_a_flare_error_of_one_line(tmp_path, monkeypatch, output, exit_code):
    fake = install_raw(tmp_path / "bin", output, exit_code)
    monkeypatch.setenv("PATH", str(fake.directory) + os.pathsep + "/usr/bin:/bin")
    try:
        gpus = query_gpus()
        assert gpus and all(isinstance(gpu, Gpu) for gpu in gpus)
        assert len(format_table(gpus, gpus).splitlines()) == len(gpus) + 1
        assert len(select_gpus(GpuRequest(allow_busy=True), gpus, None).gpus) == len(gpus)
    except FlareError as error:
        assert len(str(error).splitlines()) == 1


def test_both_nvidia_smi_calls_share_one_time_limit(server, monkeypatch):
    server("mig")
    limits = []

    def record_timeout(arguments, timeout_sec):
        limits.append(timeout_sec)
        return run_nvidia_smi(arguments, timeout_sec)

    monkeypatch.setattr("flare.gpus.nvidia_smi.run_nvidia_smi", record_timeout)
    query_gpus(timeout_sec=50, visible=mig_uuid(0, 0))
    assert limits[0] == 50
    assert limits[1] < 50


def test_mig_devices_are_queried_only_when_the_preset_names_one(server):
    fake = server("mig")
    assert not any(gpu.mig for gpu in query_gpus(visible="0,1"))
    assert len(fake.calls) == 1
    assert sum(gpu.mig for gpu in query_gpus(visible=mig_uuid(0, 0))) == 3
    assert fake.calls[2:] == ["-L"]

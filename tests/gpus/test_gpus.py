"""Claims about flare.gpus and flare.nvidia_smi, shown on the real subprocess with a fake nvidia-smi first on PATH."""

import os
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flare.errors import ConfigError, EnvError, FlareError
from flare.gpus.__main__ import format_table
from flare.gpus.nvidia_smi import Gpu, query_gpus, run_nvidia_smi
from flare.gpus.selection import (
    GpuRequest,
    Selection,
    check_gpu,
    list_gpus,
    parse_gpu_ids,
    select_environment,
    select_gpus,
    visible_gpus,
)
from flare.gpus.specs import peak_tflops
from flare.index_ranges import format_ranges
from tests.fake_nvidia_smi import FakeNvidiaSmi, gpu_uuid, install, install_raw, mig_uuid

ROOT = Path(__file__).resolve().parents[2]
GUIDE_GPUS = "GPUs found: 0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeNvidiaSmi]:
    """Makes this process see the fake of that mode."""

    def use(mode: str) -> FakeNvidiaSmi:
        fake = install(tmp_path / "bin", mode)
        monkeypatch.setenv("PATH", str(fake.directory) + os.pathsep + os.environ["PATH"])
        return fake

    return use


@pytest.fixture
def choose(server) -> Callable[..., Selection]:
    """Query the fake and choose: choose("guide", gpu_type="A40", visible="0,1")."""

    def run(mode: str, visible: str | None = None, **request) -> Selection:
        server(mode)
        return select_gpus(GpuRequest(**request), query_gpus(visible=visible), visible)

    return run


def indices(selection: Selection) -> list[int]:
    return [gpu.index for gpu in selection.gpus]


def skipped(selection: Selection) -> list[int]:
    return [skip.gpu.index for skip in selection.skipped]


def run_cli(env: dict[str, str], *arguments: str, timeout_sec: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flare.gpus", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_sec)


# --- the query ---


def test_one_call_reads_every_field_of_the_guides_server(server):
    fake = server("guide")
    gpus = query_gpus()
    assert len(fake.calls) == 1
    assert len(gpus) == 8
    assert gpus[5] == Gpu(5, "NVIDIA A40", gpu_uuid(5), 46068, 4, "570.124.06")
    assert gpus[0].memory_free_mib == 81916
    assert list_gpus(gpus) == "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"


def test_unknown_memory_is_none_and_the_gpu_is_taken_with_a_remark(choose):
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
def test_random_output_gives_gpus_or_a_flare_error_of_one_line(tmp_path, monkeypatch, output, exit_code):
    fake = install_raw(tmp_path / "bin", output, exit_code)
    monkeypatch.setenv("PATH", str(fake.directory) + os.pathsep + "/usr/bin:/bin")
    try:
        gpus = query_gpus()
        assert gpus and all(isinstance(gpu, Gpu) for gpu in gpus)
        assert len(format_table(gpus, gpus).splitlines()) == len(gpus) + 1
        assert len(select_gpus(GpuRequest(allow_busy=True), gpus, None).gpus) == len(gpus)
    except FlareError as error:
        assert len(str(error).splitlines()) == 1


# --- the choice ---


@pytest.mark.parametrize(
    ("gpu_type", "taken"),
    [
        ("A800", [0, 1, 2, 3]),
        ("a800", [0, 1, 2, 3]),
        ("A800 80GB", [0, 1, 2, 3]),
        ("nvidia a800 80gb pcie", [0, 1, 2, 3]),
        ("A40", [4, 5, 6, 7]),
        ("auto", list(range(8))),
        ("AUTO", list(range(8))),
        (None, list(range(8))),
    ],
)
def test_type_takes_the_guides_gpus(choose, gpu_type, taken):
    assert indices(choose("guide", gpu_type=gpu_type)) == taken


def test_h200_is_found_by_its_name_in_small_letters(choose):
    assert indices(choose("h200", gpu_type="h200")) == [0]


def test_a40_never_matches_a4000_or_a400(choose):
    assert indices(choose("mixed", gpu_type="A40")) == [0]


def test_a400_never_matches_a4000_or_a40(choose):
    assert indices(choose("mixed", gpu_type="A400")) == [2]


def test_words_of_a_hyphenated_name_match():
    gpus = [
        Gpu(0, "NVIDIA A100-SXM4-80GB", "GPU-a", 81920, 0),
        Gpu(1, "NVIDIA A100-PCIE-40GB", "GPU-b", 40960, 0),
    ]
    assert indices(select_gpus(GpuRequest(gpu_type="A100 80GB"), gpus, None)) == [0]
    assert indices(select_gpus(GpuRequest(gpu_type="A100-PCIE"), gpus, None)) == [1]


def test_type_that_no_gpu_has_is_an_error_with_the_gpus_and_the_nearest_word(choose):
    with pytest.raises(ConfigError, match=re.escape(GUIDE_GPUS)) as caught:
        choose("guide", gpu_type="A80")
    assert "'A80'" in str(caught.value)
    assert "did you mean 'A800'" in str(caught.value)


@pytest.mark.parametrize("gpu_type", ["", " ", "--", "*"])
def test_type_without_a_word_is_an_error_not_every_gpu(choose, gpu_type):
    with pytest.raises(ConfigError, match=re.escape(GUIDE_GPUS)):
        choose("guide", gpu_type=gpu_type)


def test_ids_are_nvidia_smis_and_keep_the_order_typed(choose):
    selection = choose("guide", gpu_ids=[5, 0, 4])
    assert indices(selection) == [5, 0, 4]
    assert select_environment(selection) == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "5,0,4",
    }


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([0, 9], "GPU 9 does not exist"),
        ([8, 9, 10], "GPU 8-10 do not exist"),
        ([-1], "GPU -1 does not exist"),
        ([0, 1, 0], "GPU 0 listed twice in --gpu_ids 0,1,0"),
        ([], "--gpu_ids is empty"),
    ],
)
def test_wrong_ids_are_named_and_the_gpus_listed(choose, ids, named):
    with pytest.raises(ConfigError, match=named) as caught:
        choose("guide", gpu_ids=ids)
    assert str(caught.value).endswith(GUIDE_GPUS)


def test_ids_of_another_type_than_asked_are_an_error(choose):
    with pytest.raises(ConfigError, match="GPU 4 of --gpu_ids does not match --gpu_type 'A800'"):
        choose("guide", gpu_ids=[0, 4], gpu_type="A800")
    assert indices(choose("guide", gpu_ids=[0, 4], gpu_type="auto")) == [0, 4]


# --- busy GPUs ---


def test_busy_gpus_are_skipped_and_named(choose):
    selection = choose("guide_busy", gpu_type="auto")
    assert indices(selection) == [1, 2, 3, 4, 6, 7]
    assert skipped(selection) == [0, 5]
    log = "\n".join(selection.describe())
    assert re.search("GPU 0 skipped: NVIDIA A800 80GB PCIe, busy: 59.8 GiB of 80.0 GiB", log)
    assert re.search("GPU 5 skipped: NVIDIA A40, busy: 1.5 GiB of 45.0 GiB", log)


def test_allow_busy_takes_them_and_says_so(choose):
    selection = choose("guide_busy", gpu_type="A40", allow_busy=True)
    assert indices(selection) == [4, 5, 6, 7]
    assert not selection.skipped
    assert any("GPU 5 is taken though busy" in note for note in selection.notes)


def test_busy_gpu_named_by_id_is_skipped_too(choose):
    selection = choose("guide_busy", gpu_ids=[0, 1])
    assert (indices(selection), skipped(selection)) == ([1], [0])


@pytest.mark.parametrize("request_", [{"gpu_ids": [0, 5]}, {"gpu_ids": [5], "gpu_type": "A40"}])
def test_only_busy_gpus_left_is_an_error_that_names_the_flag(choose, request_):
    with pytest.raises(ConfigError, match="busy; --allow_busy_gpus") as caught:
        choose("guide_busy", **request_)
    assert GUIDE_GPUS in str(caught.value)


@pytest.mark.parametrize(
    ("total", "used", "busy"),
    [
        (81920, 1024, False),  # 1 GiB itself is not over it
        (81920, 1025, True),
        (4000, 400, False),  # 10 % of a small GPU
        (4000, 401, True),
        (None, 1025, True),
        (None, None, False),
        (81920, None, False),
    ],
)
def test_busy_is_over_a_tenth_of_the_gpu_or_a_gib(total, used, busy):
    assert Gpu(0, "X", "GPU-0", total, used).is_busy is busy


# --- a preset CUDA_VISIBLE_DEVICES ---


@pytest.mark.parametrize(
    ("visible", "taken"),
    [
        ("0,1", [0, 1]),
        ("6,1", [6, 1]),
        (" 2 , 3 ", [2, 3]),
        ("0,1,-1,2", [0, 1]),
        ("0,1,99,2", [0, 1]),
        ("0,1,", [0, 1]),
        (gpu_uuid(6), [6]),
        (f"{gpu_uuid(6)},{gpu_uuid(0)}", [6, 0]),
        ("GPU-00000003", [3]),
        ("GPU-00000003,GPU-00000007,GPU-0000000f,GPU-00000001", [3, 7]),
        ("GPU-00000003,1", [3]),
        ("GPU-00000003,", [3]),
        ("007", [7]),
    ],
)
def test_preset_visible_devices_limit_auto_as_cuda_reads_them(choose, visible, taken):
    assert indices(choose("guide", visible=visible, gpu_type="auto")) == taken


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "0,0", "GPU-0000000", "-1,0", "8", ","])
def test_preset_that_hides_every_gpu_is_an_error(choose, visible):
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES") as caught:
        choose("guide", visible=visible, gpu_type="auto")
    assert GUIDE_GPUS in str(caught.value)


def test_ids_outside_the_preset_are_refused_and_the_allowed_ones_listed(choose):
    with pytest.raises(ConfigError, match="GPU 4 is outside CUDA_VISIBLE_DEVICES") as caught:
        choose("guide", visible="0,1,2,3", gpu_ids=[0, 4])
    assert "allows 0-3 NVIDIA A800" in str(caught.value)


def test_ids_inside_the_preset_stay_nvidia_smis_not_positions_in_it(choose):
    assert indices(choose("guide", visible="4,5,6,7", gpu_ids=[6, 4])) == [6, 4]


def test_type_outside_the_preset_is_not_found(choose):
    assert indices(choose("guide", visible="2,3,4", gpu_type="A800")) == [2, 3]
    with pytest.raises(ConfigError, match="no GPU is a 'A800'"):
        choose("guide", visible="4,5", gpu_type="A800")


def test_entry_at_which_cuda_stops_reading_is_told(choose):
    selection = choose("guide", visible="0,1,99,2", gpu_type="auto")
    assert any("'99'" in line for line in selection.describe())


@pytest.mark.parametrize("visible", ["0,1", "0,1,", "0,1,-1", f"{gpu_uuid(0)},"])
def test_usual_preset_needs_no_remark(choose, visible):
    assert choose("guide", visible=visible).notes == []


def test_comma_after_the_only_gpu_does_not_name_it_again(choose):
    assert indices(choose("h200", visible=f"{gpu_uuid(0)},")) == [0]


def test_visible_devices_are_read_as_torch_reads_them(server, monkeypatch):
    torch_cuda = pytest.importorskip("torch.cuda")
    if not hasattr(torch_cuda, "_parse_visible_devices") or not hasattr(torch_cuda, "_transform_uuid_to_ordinals"):
        pytest.skip("this torch has no such function")
    server("guide")
    gpus = query_gpus()
    uuids = [gpu.uuid for gpu in gpus]
    texts = [
        "",
        "0",
        "3,1",
        "0,0",
        "1,0,1",
        "-1",
        "0,-1,1",
        "0,8,1",
        "+2",
        "1gpu2,2ampere",
        "a,1",
        "1,a,2",
        " 4 ,5",
        "00000000005",
        "9" * 30,
    ]
    texts += [
        f"{uuids[2]},{uuids[0]}",
        f"{uuids[1]},{uuids[1]}",
        "GPU-00000004",
        "GPU-0",
        "GPU-x",
        f"{uuids[3]},5",
    ]
    texts += [f"5,{uuids[3]}", f"{uuids[1]},MIG-1", "NoDevFiles", "0,1,"]
    for text in texts:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        theirs = torch_cuda._parse_visible_devices()
        if theirs and isinstance(theirs[0], str):
            theirs = torch_cuda._transform_uuid_to_ordinals(theirs, uuids)
        else:  # as torch.cuda._device_count_nvml trims it
            beyond = [i for i, ordinal in enumerate(theirs) if ordinal >= len(gpus)]
            theirs = theirs[: beyond[0]] if beyond else theirs
        assert [gpu.index for gpu in visible_gpus(gpus, text)[0]] == theirs, text


# --- MIG ---


def test_mig_device_in_the_preset_is_chosen_by_its_uuid(choose):
    selection = choose("mig", visible=mig_uuid(0, 2))
    (gpu,) = selection.gpus
    assert (gpu.mig, gpu.index, gpu.name, gpu.memory_total_mib) == (
        True,
        0,
        "NVIDIA H200 MIG 3g.71gb",
        71 * 1024,
    )
    assert selection.visible_devices == mig_uuid(0, 2)


def test_mig_devices_are_asked_for_only_when_the_preset_names_one(server):
    fake = server("mig")
    assert not any(gpu.mig for gpu in query_gpus(visible="0,1"))
    assert len(fake.calls) == 1
    assert sum(gpu.mig for gpu in query_gpus(visible=mig_uuid(0, 0))) == 3
    assert fake.calls[2:] == ["-L"]


def test_both_nvidia_smi_calls_share_one_time_limit(server, monkeypatch):
    server("mig")
    limits = []

    def ask(arguments, timeout_sec):
        limits.append(timeout_sec)
        return run_nvidia_smi(arguments, timeout_sec)

    monkeypatch.setattr("flare.gpus.nvidia_smi.run_nvidia_smi", ask)
    query_gpus(timeout_sec=50, visible=mig_uuid(0, 0))
    assert limits[0] == 50
    assert limits[1] < 50


def test_only_the_first_of_several_mig_devices_is_taken_and_the_rest_named(choose):
    selection = choose("mig", visible=f"{mig_uuid(0, 1)},{mig_uuid(0, 0)}", gpu_type="h200")
    assert selection.visible_devices == mig_uuid(0, 1)
    assert [(s.gpu.uuid, "one MIG device" in s.reason) for s in selection.skipped] == [(mig_uuid(0, 0), True)]


def test_older_mig_uuids_are_understood(tmp_path, monkeypatch):
    old = "MIG-GPU-00000000-aaaa-bbbb-cccc-000000000000/1/0"
    fake = install_raw(tmp_path / "bin", b"")
    (fake.directory / "nvidia-smi").write_text(
        '#!/bin/sh\n[ "$1" = -L ] || { echo "0, NVIDIA A100-SXM4-40GB, GPU-0, 40536, 0, 450"; exit; }\n'
        f'echo "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-0)"\necho "  MIG 3g.20gb Device 0: (UUID: {old})"\n'
    )
    monkeypatch.setenv("PATH", f"{fake.directory}{os.pathsep}{os.environ['PATH']}")
    selection = select_gpus(GpuRequest(), query_gpus(visible=old), old)
    assert selection.visible_devices == old
    assert selection.gpus[0].memory_total_mib == 20 * 1024


def test_unknown_mig_device_is_an_error(choose):
    with pytest.raises(ConfigError, match="MIG-nowhere"):
        choose("mig", visible="MIG-nowhere")


# --- what people type ---


@pytest.mark.parametrize(
    ("value", "ids"),
    [
        ("0,1,2,3", [0, 1, 2, 3]),
        ("0-3", [0, 1, 2, 3]),
        ("0 1 4 5", [0, 1, 4, 5]),
        (["0", "1", "4", "5"], [0, 1, 4, 5]),
        ([0, 1, 4, 5], [0, 1, 4, 5]),
        (["0-1,4", "6"], [0, 1, 4, 6]),
        ("0，1、2", [0, 1, 2]),  # a Chinese keyboard's commas
        (" 3 , 1 ", [3, 1]),
        (7, [7]),
        (list(range(200)), list(range(200))),
    ],
)
def test_ids_are_understood_as_people_type_them(value, ids):
    assert parse_gpu_ids(value) == ids


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "--gpu_ids is empty; give numbers like 0,1"),
        ([], "--gpu_ids is empty"),
        (" , ", "is empty"),
        ("a", '--gpu_ids must be numbers like 0,1 or 0-3, got "a"'),
        ("-1", 'got "-1"'),
        ("0,-1", 'got "-1"'),
        ("0,0", "GPU 0 listed twice in --gpu_ids 0,0"),
        ("0-3,2", "GPU 2 listed twice in --gpu_ids 0-3,2"),
        ("3-0", "the range 3-0 is reversed; write 0-3"),
        ("1.5", 'got "1.5"'),
        ("²", "must be numbers"),
        ("0-", 'got "0-"'),
        ("0-99999999999", "must be numbers"),
        ([True], 'got "True"'),
        (None, 'got "None"'),
        ([[0, 1]], "must be numbers"),
        ("x\ny" * 1000, "must be numbers"),
    ],
)
def test_wrong_ids_are_one_line_that_names_them(value, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        parse_gpu_ids(value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 400


def test_error_names_the_key_that_the_user_typed():
    with pytest.raises(ConfigError, match=re.escape("training_args.gpu_ids must be numbers")):
        parse_gpu_ids(["x"], flag="training_args.gpu_ids")


@given(st.sets(st.integers(0, 300), min_size=1))
def test_listed_indices_read_back_as_the_same_set(ids):
    assert parse_gpu_ids(format_ranges(ids)) == sorted(ids)


# --- table, peak, the GPU that a rank got ---


def test_table_is_aligned_and_tells_the_state_of_every_gpu(server):
    server("guide_busy")
    gpus = query_gpus()
    lines = format_table(gpus, gpus[1:2], gpus[6:]).splitlines()
    assert len(lines) == 9
    states = [line.rsplit("GiB", 1)[1].strip() for line in lines[1:]]
    assert states == ["busy", "chosen", "free", "free", "free", "busy", "hidden", "hidden"]
    assert len({line.index("GiB") for line in lines[1:]}) == 1
    assert "20.2 GiB" in lines[1]  # (81920 - 61234) / 1024


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A800 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A400", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("GRID A100-10C", None),
        ("NVIDIA B200", None),
        ("", None),
    ],
)
def test_peak_is_the_published_one_or_none_never_a_guess(name, tflops):
    assert peak_tflops(name) == tflops


def test_rank_on_the_planned_gpu_passes_with_torchs_uuid_without_prefix():
    planned = Gpu(0, "NVIDIA A40", gpu_uuid(0), 46068, 4)
    check_gpu(planned, "NVIDIA A40", gpu_uuid(0).removeprefix("GPU-"))


@pytest.mark.parametrize(
    ("name", "uuid"),
    [
        ("NVIDIA A40", gpu_uuid(1)),
        ("NVIDIA A40 MIG 1g.5gb", gpu_uuid(0)),
        ("NVIDIA A800 80GB PCIe", gpu_uuid(0)),
    ],
)
def test_rank_on_another_gpu_is_stopped(name, uuid):
    planned = Gpu(0, "NVIDIA A40", gpu_uuid(0), 46068, 4)
    with pytest.raises(EnvError, match="plan is for GPU 0, NVIDIA A40"):
        check_gpu(planned, name, uuid)


# --- python -m flare.gpus ---


def test_command_prints_the_table_and_what_the_choice_takes(tmp_path):
    done = run_cli(install(tmp_path, "guide_busy").environment(), "--gpu_type", "A40")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:9]] == [
        "busy",
        *["free"] * 3,
        "chosen",
        "busy",
        "chosen",
        "chosen",
    ]
    assert lines[-1] == "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=4,6,7"
    assert any(line.startswith("GPU 5 skipped") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        (["--gpu_ids", "0", "1", "4", "5"], "0,1,4,5"),
        (["--gpu_ids", "0,1,4,5"], "0,1,4,5"),
        (["--gpu_ids", "0-2"], "0,1,2"),
        (["--gpu_type", "auto"], "0,1,2,3,4,5,6,7"),
        ([], "0,1,2,3,4,5,6,7"),
    ],
)
def test_command_takes_the_guides_choices(tmp_path, arguments, visible):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert done.stdout.splitlines()[-1].endswith(f"CUDA_VISIBLE_DEVICES={visible}")


@pytest.mark.parametrize(
    "arguments",
    [
        *[["--gpu_ids", ids] for ids in ("9", "-1", "0,0", "a", "", "3-0")],
        ["--gpu_type", "A4000"],
    ],
)
def test_wrong_request_is_one_line_with_the_gpus_and_exit_2(tmp_path, arguments):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert GUIDE_GPUS in line
    assert (arguments[1] or "empty") in line


@pytest.mark.parametrize("arguments", [["--nonsense"], ["--gpu_ids", "0", "--gpu_type", "A40"], ["--gpu_type"]])
def test_wrong_command_line_is_one_line_and_exit_2(tmp_path, arguments):
    done = run_cli(install(tmp_path).environment(), *arguments)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("mode", ["rubbish", "empty", "gbk", "exit9"])
def test_bad_nvidia_smi_is_one_line_and_exit_4(tmp_path, mode):
    done = run_cli(install(tmp_path, mode).environment())
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: nvidia-smi")


def test_missing_nvidia_smi_is_exit_4(tmp_path):
    done = run_cli(install(tmp_path / "bin").environment(PATH=str(tmp_path)))
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)


def test_wrong_ids_are_told_even_where_nvidia_smi_is_missing(tmp_path):
    done = run_cli(install(tmp_path / "bin").environment(PATH=str(tmp_path)), "--gpu_ids", "a")
    assert done.returncode == 2
    assert 'got "a"' in done.stderr


def test_odd_gpu_name_prints_under_an_ascii_locale(tmp_path):
    done = run_cli(install(tmp_path, "gbk_name").environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, "")


def test_preset_is_the_commands_limit_and_the_rest_is_hidden(tmp_path):
    done = run_cli(install(tmp_path).environment(CUDA_VISIBLE_DEVICES="2,3"))
    assert done.stdout.splitlines()[-1].endswith("CUDA_VISIBLE_DEVICES=2,3")
    assert sum(line.endswith("hidden") for line in done.stdout.splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["--gpu_ids", "a"]])
def test_hanging_nvidia_smi_ends_the_command_in_under_12_seconds(tmp_path, arguments):
    done = run_cli(install(tmp_path, "hang").environment(), *arguments, timeout_sec=12)
    assert (done.returncode, len(done.stderr.splitlines())) == ((2, 1) if arguments else (4, 1))


def test_import_needs_the_standard_library_only(tmp_path):
    code = "import sys, flare.gpus.__main__; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    ours = {"flare", "__main__", "_distutils_hack", "sitecustomize", "usercustomize"}
    foreign = set(done.stdout.split()) - set(sys.stdlib_module_names) - ours
    assert done.returncode == 0
    assert "torch" not in foreign and not {name for name in foreign if not name.startswith("_")}

"""A preset CUDA_VISIBLE_DEVICES is a limit, read as CUDA reads it; MIG devices."""

import os

import pytest

from flare.errors import ConfigError
from flare.gpus.nvidia_smi import query_gpus
from flare.gpus.selection import (
    GpuRequest,
    select_gpus,
    visible_gpus,
)
from tests.fake_nvidia_smi import gpu_uuid, install_raw, mig_uuid
from tests.gpus.selections import GUIDE_GPUS, indices


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


def test_entry_at_which_cuda_stops_reading_is_reported(choose):
    selection = choose("guide", visible="0,1,99,2", gpu_type="auto")
    assert any("'99'" in line for line in selection.describe())


@pytest.mark.parametrize("visible", ["0,1", "0,1,", "0,1,-1", f"{gpu_uuid(0)},"])
def test_usual_preset_needs_no_note(choose, visible):
    assert choose("guide", visible=visible).notes == []


def test_comma_after_the_only_gpu_does_not_name_it_twice(choose):
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

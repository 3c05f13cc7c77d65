"""Selection by type and by index, busy GPUs, and the check that a rank has the planned GPU."""

import re

import pytest

from flare.errors import ConfigError, EnvError
from flare.gpus.nvidia_smi import Gpu
from flare.gpus.selection import (
    GpuRequest,
    check_gpu,
    select_environment,
    select_gpus,
)
from tests.fake_nvidia_smi import gpu_uuid
from tests.gpus.selections import GUIDE_GPUS, indices, skipped


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


def test_ids_of_another_type_than_requested_are_an_error(choose):
    with pytest.raises(ConfigError, match="GPU 4 of --gpu_ids does not match --gpu_type 'A800'"):
        choose("guide", gpu_ids=[0, 4], gpu_type="A800")
    assert indices(choose("guide", gpu_ids=[0, 4], gpu_type="auto")) == [0, 4]


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
    assert any("GPU 5 is used although busy" in note for note in selection.notes)


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

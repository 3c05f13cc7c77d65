"""Each rank is bound to the GPU of the plan, or stops."""

from types import SimpleNamespace

import pytest
import torch

from flare.distributed import process_group
from flare.errors import EnvError
from tests.launch.runs import GPUS


def fake_cuda(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str]]) -> list[int]:
    """torch.cuda with these (name, uuid); returns the list of devices that were bound."""
    bound: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append(device))
    properties = [SimpleNamespace(name=name, uuid=uuid) for name, uuid in gpus]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device])
    return bound


def test_rank_with_the_planned_gpu_is_bound_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = fake_cuda(monkeypatch, [(c.name, c.uuid.removeprefix("GPU-")) for c in GPUS])
    monkeypatch.setenv("LOCAL_RANK", "1")
    world = process_group.start(True, 60, GPUS)
    assert (world.device, bound) == (torch.device("cuda", 1), [1])


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        ([(GPUS[1].name, "00000001"), (GPUS[0].name, "00000000")], ["GPU 0, NVIDIA A800", "got NVIDIA A40"]),
        ([(GPUS[0].name, "00000007"), (GPUS[1].name, "00000001")], ["GPU 0", "00000007"]),
        ([], ["local rank 0 has no GPU: torch sees 0"]),
    ],
    ids=["other order", "other uuid", "lost GPU"],
)
def test_rank_with_another_gpu_stops_before_it_allocates(
    monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[str, str]], words: list[str]
) -> None:
    fake_cuda(monkeypatch, gpus)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(EnvError) as error:
        process_group.start(True, 60, GPUS)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("capability", "refused"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)])
def test_a_gpu_without_bf16_stops_a_run_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], refused: bool
) -> None:
    """By torch's compute capability, not by name."""
    fake_cuda(monkeypatch, [("NVIDIA X", "0")])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X")
    process_group.bind_gpu(0, (), needs_bf16=False)
    if not refused:
        process_group.bind_gpu(0, (), needs_bf16=True)
        return
    with pytest.raises(EnvError, match=rf"NVIDIA X has no bf16 .*{capability[0]}\.{capability[1]}.*--precision fp16"):
        process_group.bind_gpu(0, (), needs_bf16=True)

"""A real executable ``nvidia-smi`` that shows the GPUs of a server that we don't have, or misbehaves.

``install(directory, mode)`` writes it; tests put ``directory`` first on PATH and run the real subprocess.
It answers ``--query-gpu=FIELDS --format=csv[,noheader][,nounits]``, ``-L`` and a bare call (the header with
the driver's CUDA version), refuses fields that it does not know as the real one does, and notes every call.

Modes: the keys of SERVERS (good answers) and of MISBEHAVIOURS; ``install_raw`` prints given bytes.
"""

import json
import os
import shlex
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

DRIVER, CUDA = "570.124.06", "12.8"


@dataclass(frozen=True)
class FakeGpu:
    """One GPU as nvidia-smi reports it; memory in MiB, or a text such as "[N/A]"."""

    name: str
    total: int | str
    used: int | str = 4
    mig_profiles: tuple[str, ...] = ()


A800, A40 = FakeGpu("NVIDIA A800 80GB PCIe", 81920), FakeGpu("NVIDIA A40", 46068)
H200 = FakeGpu("NVIDIA H200", 143771)

SERVERS: dict[str, list[FakeGpu]] = {
    "guide": [A800] * 4 + [A40] * 4,
    "guide_busy": [
        *[FakeGpu(A800.name, A800.total, 61234), A800, A800, A800],
        *[A40, FakeGpu(A40.name, A40.total, 1500), A40, A40],  # 3 % of the GPU, and over 1 GiB
    ],
    "h200": [H200],
    "one_24_gib": [FakeGpu("NVIDIA GeForce RTX 4090", 24564)],
    "node": [A800] * 4,
    "v100": [FakeGpu("Tesla V100-SXM2-32GB", 32768)] * 4,
    "old_and_new": [A40, FakeGpu("Quadro RTX 6000", 24576)],
    "mixed": [A40, FakeGpu("NVIDIA RTX A4000", 16376), FakeGpu("NVIDIA RTX A400", 4094), A800],
    "mig": [
        FakeGpu("NVIDIA H200", 143771, 87, ("1g.18gb", "1g.18gb", "3g.71gb")),
        FakeGpu("NVIDIA H200", 143771, 4),
    ],
    "not_available": [
        FakeGpu("NVIDIA GB10", "[N/A]", "[N/A]"),
        FakeGpu("NVIDIA A40", 46068, "[Insufficient Permissions]"),
        FakeGpu("NVIDIA A40", 46068, "[Not Supported]"),
    ],
}

NO_DRIVER = (
    b"NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. "
    b"Make sure that the latest NVIDIA driver is installed and running.\n\n"
)
MISBEHAVIOURS: dict[str, tuple[bytes, int]] = {
    "rubbish": (b"Segmentation fault? 42, 17\nno GPUs, sorry\n", 0),
    "empty": (b"", 0),
    "gbk": ("找不到任何显卡,请联系管理员\n".encode("gbk"), 0),
    "gbk_name": (
        b"0, " + "英伟达 A40".encode("gbk") + b", GPU-00000000-aaaa-bbbb-cccc-000000000000, 46068, 4, 570\n",
        0,
    ),
    "exit9": (NO_DRIVER, 9),
    "inforom": (
        b"0, NVIDIA A40, GPU-00000000-aaaa-bbbb-cccc-000000000000, 46068, 4, 570\n"
        b"WARNING: infoROM is corrupted at gpu 0000:3B:00.0\n",
        14,
    ),
    "hang": (b"", 0),  # see install: it also starts a child that hangs
}


@dataclass
class FakeNvidiaSmi:
    """An installed fake. ``directory`` must be first on PATH (``environment`` does this)."""

    directory: Path
    _calls: Path = field(repr=False)

    @property
    def calls(self) -> list[str]:
        """The argument lines of every call so far."""
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def environment(self, **changes: str) -> dict[str, str]:
        """os.environ with the fake first on PATH, CUDA_VISIBLE_DEVICES unset, and ``changes``."""
        env = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
        return {**env, "PATH": f"{self.directory}{os.pathsep}{env['PATH']}", **changes}


def gpu_uuid(index: int) -> str:
    """UUID of a fake GPU; "GPU-0000000N" is enough to name it."""
    return f"GPU-{index:08x}-aaaa-bbbb-cccc-{index:012x}"


def mig_uuid(index: int, device: int) -> str:
    """UUID of a fake MIG device."""
    return f"MIG-{index:04x}{device:04x}-dddd-eeee-ffff-{device:012x}"


def install(directory: Path, mode: str = "guide") -> FakeNvidiaSmi:
    """Write an executable ``nvidia-smi`` into ``directory`` (made when missing) that behaves as ``mode``.

    "hang" never answers, nor does the child that it starts, which holds stdout. When ``directory`` has a
    FIFO "alive" with a reader, both hold it open and "started" comes through it: its end of file is the
    proof that both are dead.
    """
    if mode == "hang":
        script = 'if [ -p "$here/alive" ]; then exec 3>"$here/alive"; echo started >&3; fi\nsleep 600 &\nwait\n'
        return _write(directory, script)
    if mode in MISBEHAVIOURS:
        return install_raw(directory, *MISBEHAVIOURS[mode])
    fake = _write(directory, f'exec {shlex.quote(sys.executable)} -I -S "$here/answer.py" "$@"\n')
    (directory / "answer.py").write_text(_ANSWER)
    (directory / "server.json").write_text(json.dumps(_describe(SERVERS[mode])))
    return fake


def install_raw(directory: Path, stdout: bytes, exit_code: int = 0) -> FakeNvidiaSmi:
    """An ``nvidia-smi`` that prints exactly these bytes, for any arguments, and exits."""
    fake = _write(directory, f'cat "$here/stdout.bin"\nexit {exit_code}\n')
    (directory / "stdout.bin").write_bytes(stdout)
    return fake


def _write(directory: Path, body: str) -> FakeNvidiaSmi:
    directory.mkdir(parents=True, exist_ok=True)
    here = shlex.quote(str(directory))
    script = directory / "nvidia-smi"
    script.write_text(f'#!/bin/sh\nhere={here}\necho "$*" >>"$here/calls.log"\n{body}')
    script.chmod(script.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return FakeNvidiaSmi(directory, directory / "calls.log")


def _describe(gpus: list[FakeGpu]) -> dict:
    """What answer.py needs: the query fields of every GPU (with their units) and the -L listing."""
    fields, listing = [], []
    for i, gpu in enumerate(gpus):
        known = isinstance(gpu.total, int) and isinstance(gpu.used, int)
        fields.append(
            {
                "index": [str(i), ""],
                "name": [gpu.name, ""],
                "uuid": [gpu_uuid(i), ""],
                "memory.total": [str(gpu.total), "MiB"],
                "memory.used": [str(gpu.used), "MiB"],
                "memory.free": [str(gpu.total - gpu.used) if known else "[N/A]", "MiB"],
                "utilization.gpu": ["0", "%"],
                "driver_version": [DRIVER, ""],
                "pci.bus_id": [f"00000000:{0x10 + i:02X}:00.0", ""],
                "count": [str(len(gpus)), ""],
            }
        )
        listing.append(f"GPU {i}: {gpu.name} (UUID: {gpu_uuid(i)})")
        listing += [
            f"  MIG {profile:<12}Device  {j}: (UUID: {mig_uuid(i, j)})" for j, profile in enumerate(gpu.mig_profiles)
        ]
    header = f"| NVIDIA-SMI {DRIVER}     Driver Version: {DRIVER}     CUDA Version: {CUDA}     |"
    return {"fields": fields, "listing": listing, "header": header}


_ANSWER = """\
import json, os, sys
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "server.json")) as file:
    server = json.load(file)
arguments = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
if not arguments:
    print(server["header"])
elif list(arguments) == ["-L"]:
    print("\\n".join(server["listing"]))
elif sorted(arguments) == ["--format", "--query-gpu"]:
    names = [name.strip() for name in arguments["--query-gpu"].split(",")]
    wishes = arguments["--format"].split(",")
    for name in names:
        if name not in server["fields"][0]:
            print(f'Field "{name}" is not a valid field to query.\\n')
            sys.exit(2)
    if "noheader" not in wishes:
        print(", ".join(names))
    for gpu in server["fields"]:
        cells = [gpu[name] for name in names]
        unit = "nounits" not in wishes
        print(", ".join(f"{v} {u}" if unit and u and v.isdigit() else v for v, u in cells))
else:
    print(f"Invalid combination of input arguments: {sys.argv[1:]}")
    sys.exit(1)
"""

"""List the GPUs of this machine with nvidia-smi. Standard library only.

One ``nvidia-smi`` query lists the GPUs; a second one lists the MIG devices when CUDA_VISIBLE_DEVICES names one.
Whatever nvidia-smi does (hang, fail, print garbage), the caller gets GPUs or an EnvError of one line. selection.py
selects the GPUs of a run.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from flare.errors import EnvError, one_line

TIMEOUT_SEC = 10.0
"""Timeout of nvidia-smi (contract, section 2)."""

BUSY_FRACTION, BUSY_MIB = 0.10, 1024
"""A GPU is busy when more than this share of its memory, or more than this many MiB, is in use."""

QUERY = "index,name,uuid,memory.total,memory.used,driver_version"

INFOROM_WARNING = 14
"""nvidia-smi's exit code when the infoROM of a GPU is corrupted. The list is valid. Source: its man page."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one MIG device of a GPU."""

    index: int  # nvidia-smi's index; for a MIG device that of its GPU
    name: str
    uuid: str
    memory_total_mib: int | None  # None when not reported ([N/A]); for a MIG device the size in its profile
    memory_used_mib: int | None  # None when not reported, and for every MIG device
    driver_version: str = ""
    mig: bool = False

    @property
    def memory_free_mib(self) -> int | None:
        """Total minus used; None when either is unknown."""
        if self.memory_total_mib is None or self.memory_used_mib is None:
            return None
        return max(0, self.memory_total_mib - self.memory_used_mib)

    @property
    def is_busy(self) -> bool:
        """Whether another process uses it. Unknown use counts as free, or such a GPU could never be selected."""
        limit_mib = min(BUSY_FRACTION * (self.memory_total_mib or float("inf")), BUSY_MIB)
        return (self.memory_used_mib or 0) > limit_mib


def query_gpus(timeout_sec: float = TIMEOUT_SEC, visible: str | None = None) -> list[Gpu]:
    """The GPUs of this machine, from one nvidia-smi call.

    Args:
        timeout_sec: total timeout. After it, nvidia-smi and its child processes are killed.
        visible: CUDA_VISIBLE_DEVICES; None when unset. Only when it has a ``MIG-`` entry, a second call
            (``nvidia-smi -L``) appends the MIG devices.

    Raises:
        EnvError: nvidia-smi is missing, hangs, fails, or does not print a list of GPUs.
    """
    t0 = time.monotonic()
    output = run_nvidia_smi([f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"], timeout_sec)
    gpus = _parse_gpus(output)
    if visible and "MIG-" in visible:
        left_sec = max(0.1, timeout_sec - (time.monotonic() - t0))
        gpus += _parse_mig_devices(run_nvidia_smi(["-L"], left_sec), gpus)
    return gpus


def run_nvidia_smi(arguments: list[str], timeout_sec: float) -> str:
    """The output of ``nvidia-smi ARGUMENTS``. Raises EnvError with one line when it fails."""
    command = ["nvidia-smi", *arguments]
    pipe = subprocess.PIPE
    try:  # in a new session, so that its child processes can be killed with it
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True)
    except FileNotFoundError:
        raise EnvError(
            "nvidia-smi not found on PATH; install the NVIDIA driver, "
            "or train on the CPU (./run_training.sh STAGE cpu)"
        ) from None
    except OSError as error:
        raise EnvError(f"nvidia-smi cannot be started: {error.strerror or error}") from None
    try:
        out_bytes, err_bytes = process.communicate(timeout=timeout_sec)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise EnvError(
            f"nvidia-smi hangs: no answer in {timeout_sec:.3g} s, killed it; "
            "the driver or a GPU is stuck (see dmesg; a reboot is the usual fix)"
        ) from None
    except BaseException:  # Ctrl-C does not reach a process in another session
        _kill_group(process)
        raise
    output, errors = (raw.decode("utf-8", errors="replace") for raw in (out_bytes, err_bytes))
    code = process.returncode
    if code not in (0, INFOROM_WARNING):
        how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        printed = one_line(output) or one_line(errors) or "nothing"
        raise EnvError(f"nvidia-smi failed ({how}) and printed: {printed}")
    return output


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill nvidia-smi and its child processes. A stuck driver may block even that, so wait at most 1 s."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _parse_gpus(output: str) -> list[Gpu]:
    """The GPUs in the CSV output of QUERY. Raises EnvError when any line is not a GPU."""
    lines = [line for line in output.splitlines() if line.strip() and not line.startswith("WARNING:")]
    if not lines:
        raise EnvError("nvidia-smi printed nothing, so it finds no GPU; see `nvidia-smi -L`")
    gpus: list[Gpu] = []
    for line in lines:
        gpu = _parse_row(line)
        if gpu is None or any(gpu.index == other.index for other in gpus):
            raise EnvError(f"nvidia-smi did not print a list of GPUs but: {one_line(line) or repr(line)}")
        gpus.append(gpu)
    return gpus


def _parse_row(line: str) -> Gpu | None:
    """The GPU of one CSV line; None when the line is not a GPU. The name may contain commas."""
    parts = [one_line(part) for part in line.split(",")]
    if len(parts) < 6 or not re.fullmatch("[0-9]{1,4}", parts[0]):
        return None
    name, (uuid, total, used, driver) = ", ".join(parts[1:-4]), parts[-4:]
    if not (name and uuid and all(re.fullmatch(r"[0-9]{1,9}|\[.*\]|N/A", mib) for mib in (total, used))):
        return None
    # "[N/A]", "[Not Supported]", "[Insufficient Permissions]", ...: a value that is not reported
    total_mib, used_mib = (int(mib) if mib.isdecimal() else None for mib in (total, used))
    return Gpu(int(parts[0]), name, uuid, total_mib, used_mib, driver)


def _parse_mig_devices(listing: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """The MIG devices in the output of ``nvidia-smi -L``: indented lines below the line of their GPU."""
    devices: list[Gpu] = []
    gpu: Gpu | None = None
    for line in listing.splitlines():
        if match := re.match(r"GPU ([0-9]{1,4}):", line):
            gpu = next((c for c in gpus if c.index == int(match[1])), None)
        elif gpu and (match := re.match(r"\s+MIG (\S+)\s+Device\s+[0-9]+: \(UUID: (MIG-[^)\s]+)\)", line)):
            profile, uuid = one_line(match[1]), one_line(match[2])
            size = re.search(r"([0-9]{1,4})gb", profile)  # "1g.18gb": nominal size, slightly above the real one
            total_mib = int(size[1]) * 1024 if size else None
            name = f"{gpu.name} MIG {profile}"
            devices.append(Gpu(gpu.index, name, uuid, total_mib, None, gpu.driver_version, mig=True))
    return devices

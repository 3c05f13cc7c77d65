"""Asking nvidia-smi which GPUs this machine has. Standard library only.

One ``nvidia-smi`` query gives the GPUs, a second one the MIG devices when they matter. Whatever nvidia-smi
does (hang, fail, print rubbish), the caller gets GPUs or an EnvError of one line. Which of the GPUs a run
takes is gpus.py's.
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
"""How long nvidia-smi may take (contract, section 2)."""

BUSY_FRACTION, BUSY_MIB = 0.10, 1024
"""More memory in use than this share of the GPU, or than this much, whichever is less: it is busy."""

QUERY = "index,name,uuid,memory.total,memory.used,driver_version"

INFOROM_WARNING = 14
"""nvidia-smi's exit code when a GPU's infoROM is corrupted: the list is good. Source: its man page."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one MIG device of a GPU."""

    index: int  # nvidia-smi's; of a MIG device: its GPU's
    name: str
    uuid: str
    memory_total_mib: int | None  # None: nvidia-smi does not say ([N/A]); of a MIG device: its profile's size
    memory_used_mib: int | None  # None: nvidia-smi does not say; always so for a MIG device
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
        """Another process holds it. Unknown use counts as free: else such a GPU could never be taken."""
        limit_mib = min(BUSY_FRACTION * (self.memory_total_mib or float("inf")), BUSY_MIB)
        return (self.memory_used_mib or 0) > limit_mib


def query_gpus(timeout_sec: float = TIMEOUT_SEC, visible: str | None = None) -> list[Gpu]:
    """The GPUs of this machine, from one nvidia-smi call.

    Args:
        timeout_sec: for everything; nvidia-smi and what it started are killed after that.
        visible: CUDA_VISIBLE_DEVICES, None when unset. Only when a ``MIG-`` entry is in it, a second call
            (``nvidia-smi -L``) adds the MIG devices, behind the whole GPUs.

    Raises:
        EnvError: nvidia-smi is missing, hangs, fails, or prints something else than a list of GPUs.
    """
    t0 = time.monotonic()
    output = run_nvidia_smi([f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"], timeout_sec)
    gpus = _parse_gpus(output)
    if visible and "MIG-" in visible:
        left_sec = max(0.1, timeout_sec - (time.monotonic() - t0))
        gpus += _parse_mig_devices(run_nvidia_smi(["-L"], left_sec), gpus)
    return gpus


def run_nvidia_smi(arguments: list[str], timeout_sec: float) -> str:
    """What ``nvidia-smi ARGUMENTS`` prints. Raises EnvError, one line, when it does not do its work."""
    command = ["nvidia-smi", *arguments]
    pipe = subprocess.PIPE
    try:  # in a session of its own, so that what it starts can be killed with it
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
            "the driver or a GPU is stuck (see dmesg; a reboot is the usual cure)"
        ) from None
    except BaseException:  # Ctrl-C does not reach another session by itself
        _kill_group(process)
        raise
    output, errors = (raw.decode("utf-8", errors="replace") for raw in (out_bytes, err_bytes))
    code = process.returncode
    if code not in (0, INFOROM_WARNING):
        how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        said = one_line(output) or one_line(errors) or "nothing"
        raise EnvError(f"nvidia-smi failed ({how}) and said: {said}")
    return output


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to nvidia-smi and its children. A stuck driver may hold it even then: wait 1 s, no longer."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for stream in (process.stdout, process.stderr):
        if stream:
            stream.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)


def _parse_gpus(output: str) -> list[Gpu]:
    """The GPUs in the CSV of QUERY. Raises EnvError when a line is anything else: no GPU is guessed."""
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
    """The GPU of one CSV line, None when it is no such line. Commas may be in the name."""
    parts = [one_line(part) for part in line.split(",")]
    if len(parts) < 6 or not re.fullmatch("[0-9]{1,4}", parts[0]):
        return None
    name, (uuid, total, used, driver) = ", ".join(parts[1:-4]), parts[-4:]
    if not (name and uuid and all(re.fullmatch(r"[0-9]{1,9}|\[.*\]|N/A", mib) for mib in (total, used))):
        return None
    # "[N/A]", "[Not Supported]", "[Insufficient Permissions]", ...: a GPU that does not tell
    total_mib, used_mib = (int(mib) if mib.isdecimal() else None for mib in (total, used))
    return Gpu(int(parts[0]), name, uuid, total_mib, used_mib, driver)


def _parse_mig_devices(listing: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """MIG devices in the output of ``nvidia-smi -L``: indented lines below the line of their GPU."""
    devices: list[Gpu] = []
    gpu: Gpu | None = None
    for line in listing.splitlines():
        if match := re.match(r"GPU ([0-9]{1,4}):", line):
            gpu = next((c for c in gpus if c.index == int(match[1])), None)
        elif gpu and (match := re.match(r"\s+MIG (\S+)\s+Device\s+[0-9]+: \(UUID: (MIG-[^)\s]+)\)", line)):
            profile, uuid = one_line(match[1]), one_line(match[2])
            size = re.search(r"([0-9]{1,4})gb", profile)  # "1g.18gb": nominal, a little above the real size
            total_mib = int(size[1]) * 1024 if size else None
            name = f"{gpu.name} MIG {profile}"
            devices.append(Gpu(gpu.index, name, uuid, total_mib, None, gpu.driver_version, mig=True))
    return devices

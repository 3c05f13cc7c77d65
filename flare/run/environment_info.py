"""environment_info.txt: versions, GPUs, git commit and relevant environment variables, without secrets."""

import os
import platform
import re
import socket
import subprocess
import sys
import time
from importlib import metadata

from flare.errors import without_users
from flare.files import REPO

ENVIRONMENT_PREFIXES = (
    "CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH_", "PYTORCH_", "HF_", "FLARE_", "MASTER_", "NNODES", "NODE_RANK",
    "SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NODEID",
)  # fmt: skip


PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "flash-attn",
)


SECRET = re.compile(r"TOKEN|SECRET|PASS|PWD|KEY|CREDENTIAL|AUTH|COOKIE|BEARER|PRIVATE", re.I)


def environment_lines() -> list[str]:
    """OS, Python, packages, GPUs, git commit and relevant environment variables, one per line."""
    lines = [
        f"date: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
        f"host: {socket.gethostname()}",
        f"os: {platform.platform()}",
        f"cpu count: {os.cpu_count()}",
        f"python: {sys.version.split()[0]} ({sys.executable})",
        f"git commit: {_output(['git', '-C', str(REPO), 'rev-parse', 'HEAD']) or 'not a git checkout'}",
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name}: {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    lines += _gpu_lines()
    for name in sorted(os.environ):
        if name.startswith(ENVIRONMENT_PREFIXES) and not SECRET.search(name):
            lines.append(f"env {name}={without_users(os.environ[name])}")
    return lines


def _gpu_lines() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index,name,uuid,memory.total,driver_version", "--format=csv,noheader"]
    found = _output(query)
    lines = [f"gpu: {line}" for line in found.splitlines()] if found else ["gpu: none found by nvidia-smi"]
    torch = sys.modules.get("torch")  # this record must not import torch if the run does not need it
    return [*lines, f"cuda of torch: {torch.version.cuda if torch else 'torch not loaded'}"]


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.decode(errors="replace").strip()

"""Check optional packages and compilers that a flag needs, before the run starts. Does not import torch."""

import os
import shutil
from importlib.util import find_spec

from flare.errors import EnvError
from flare.plan.optimizer_state import EIGHT_BIT


def check_compiler(use_cuda: bool, flag: str = "--compile") -> None:
    """Check the compilers for ``--compile``, or for another flag that compiles code.

    Raises: EnvError when the C++ compiler (CPU), or triton or its C compiler (GPUs), is missing.
    """
    if use_cuda and find_spec("triton") is None:
        raise EnvError(f"{flag} needs triton, which is not installed; pip install triton, or leave {flag} out")
    variable, usual = ("CC", ("gcc", "clang")) if use_cuda else ("CXX", ("g++",))
    given = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([given] if given else usual)):
        missing = f"{variable}={given}" if given else " or ".join(usual)
        raise EnvError(
            f"{flag} needs a compiler, and {missing} is not found; install one, name it in {variable}, or leave "
            f"{flag} out"
        )


def check_torchao(use_cuda: bool) -> None:
    """Check the packages for ``--optim adamw_torch_8bit``.

    Raises: EnvError when torchao is missing, or on GPUs the compiler for its update.
    """
    if find_spec("torchao") is None:
        raise EnvError(
            f"--optim {EIGHT_BIT} needs the torchao package, which is not installed: pip install torchao; or use "
            "--optim adamw_torch_fused"
        )
    if use_cuda:
        check_compiler(use_cuda, f"--optim {EIGHT_BIT}")

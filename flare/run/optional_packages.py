"""Optional packages and compilers that a flag needs, checked before the run starts. No torch."""

import os
import shutil
from importlib.util import find_spec

from flare.errors import EnvError
from flare.plan.optimizer_state import EIGHT_BIT


def check_compiler(use_cuda: bool, flag: str = "--compile") -> None:
    """Refuse ``--compile``, or another flag whose work is compiled, where code could not be made. No torch.

    Raises: EnvError when the C++ compiler (CPU), or triton or its C compiler (GPUs), is missing.
    """
    if use_cuda and find_spec("triton") is None:
        raise EnvError(f"{flag} needs triton, which is not installed; pip install triton, or leave {flag} out")
    variable, usual = ("CC", ("gcc", "clang")) if use_cuda else ("CXX", ("g++",))
    asked = os.environ.get(variable)
    if not any(shutil.which(name) for name in ([asked] if asked else usual)):
        missing = f"{variable}={asked}" if asked else " or ".join(usual)
        raise EnvError(
            f"{flag} needs a compiler, and {missing} is not found; install one, name it in {variable}, or leave "
            f"{flag} out"
        )


def check_torchao(use_cuda: bool) -> None:
    """Refuse ``--optim adamw_torch_8bit`` where it could not run. No torch.

    Raises: EnvError when torchao, or on GPUs what its compiled update needs, is missing.
    """
    if find_spec("torchao") is None:
        raise EnvError(
            f"--optim {EIGHT_BIT} needs the torchao package, which is not installed: pip install torchao; or use "
            "--optim adamw_torch_fused"
        )
    if use_cuda:
        check_compiler(use_cuda, f"--optim {EIGHT_BIT}")

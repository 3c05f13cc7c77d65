"""``--compile``: each decoder layer is compiled by itself, once for each kind of layer, not once for each layer.

What would make another graph later is held still: attention always gets a mask (see ``TrainingModel``), bounds have a
fixed shape, evaluation runs uncompiled. A last, smaller micro-batch of a step is compiled once, too.
"""

import contextlib
import os
import shutil
from importlib.util import find_spec

from flare.errors import EnvError

GRAPHS = 64
"""Graphs that the code of a decoder layer may have: RoPE or NoPE, what trains in it, sizes of micro-batches."""


def check_compiler(use_cuda: bool, flag: str = "--compile") -> None:
    """Refuse ``--compile``, or another flag whose work is compiled, where code could not be made. No torch.

    Raises: EnvError when the C++ compiler (CPU), or triton or its C compiler (cards), is missing.
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


def compile_layers(model: object, backend: str = "inductor") -> None:
    """Compile every decoder layer of a ``TrainingModel``, whole; the work is done at the first pass, and backward."""
    import torch

    from flare.sharding import is_sharded

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    how = {"fullgraph": True, "dynamic": False, "backend": backend}
    for layer in model.causal_lm.get_decoder().layers:
        if is_sharded(layer):  # its weights are gathered by hooks, which stay outside
            layer.forward = torch.compile(layer.forward, **how)
        else:
            layer.compile(**how)
    model.compiled = True


def uncompiled(model: object) -> contextlib.AbstractContextManager:
    """Run the layers of a ``TrainingModel`` as they are written, for what is done too rarely to compile for it."""
    if not model.compiled:
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")

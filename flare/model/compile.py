"""``--compile``: each decoder layer is compiled by itself, once for each kind of layer, not once for each layer.

What would make another graph later is held still: attention always gets a mask (see ``TrainingModel``), bounds have a
fixed shape, evaluation runs uncompiled. A last, smaller micro-batch of a step is compiled once, too.
"""

import contextlib

GRAPHS = 64
"""Graphs that the code of a decoder layer may have: RoPE or NoPE, what trains in it, sizes of micro-batches."""


def compile_layers(model: object, backend: str = "inductor") -> None:
    """Compile every decoder layer of a ``TrainingModel``, whole; the work is done at the first pass, and backward."""
    import torch

    from flare.distributed.fsdp import is_sharded

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

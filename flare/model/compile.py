"""``--compile``: each decoder layer is compiled by itself, and layers of the same kind share one graph.

What would need another graph later is kept constant: attention always gets a mask (see ``TrainingModel``), bounds have
a fixed shape, evaluation runs uncompiled. A smaller last micro-batch of a step is compiled once, too.
"""

import contextlib

GRAPHS = 64
"""The most graphs of a decoder layer's code: RoPE or NoPE, which weights train, sizes of micro-batches."""


def compile_layers(model: object, backend: str = "inductor") -> list[int]:
    """Compile every decoder layer of a ``TrainingModel`` as one graph, at the first forward and backward pass.

    Returns: indices of the compiled layers.
    """
    import torch

    from flare.distributed.fsdp import is_sharded

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    settings = {"fullgraph": True, "dynamic": False, "backend": backend}
    layers = model.causal_lm.get_decoder().layers
    for layer in layers:
        if is_sharded(layer):  # its weights are gathered by hooks, which stay outside
            layer.forward = torch.compile(layer.forward, **settings)
        else:
            layer.compile(**settings)
    model.compiled = True
    return list(range(len(layers)))


def uncompiled(model: object) -> contextlib.AbstractContextManager:
    """Run the layers of a ``TrainingModel`` without compilation, for work too rare to be worth compiling."""
    if not model.compiled:
        return contextlib.nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")

"""Estimates how a step scales to many GPUs: ``python -m benchmarks.scaling_paper`` prints the shares of
docs/scaling.md.

Nothing here is measured. Collectives are rings. For S bytes on N GPUs, an all-gather or a reduce-scatter takes
(N - 1) / N x S / bandwidth, and an all-reduce takes twice as long. The slowest link sets the bandwidth: the link
between two GPUs of a host, or all network adapters of a host together, which carry that many rings in parallel. Each
collective also takes log2(N) times the latency of a message.

DDP reduces fp32 gradients once per step, during the backward pass of the last micro-batch. FSDP2 gathers bf16 weights
in the forward and in the backward pass and reduces fp32 gradients, one layer at a time, in every micro-batch. Each of
these transfers overlaps with the computation of another layer.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from flare.plan.flops import token_flops
from flare.plan.model_shape import FP32_BYTES, HALF_BYTES, ModelShape, known_shape
from flare.plan.trainable import Trainable

MFU = 0.45
"""Of the peak, what the arithmetic alone reaches; a guess between torchtitan's 39 % and TinyLlama's 52 %."""
LATENCY_SEC = 20e-6
"""Of one message; a guess."""


@dataclass(frozen=True)
class Cluster:
    """GPUs and their links, each way, as their makers state them, in bytes per second."""

    name: str
    gpus_per_host: int
    peak_flops: float
    inside: float  # between two GPUs of a host
    network: float  # of a host, all its network GPUs together

    def collective_sec(self, size_bytes: float, gpus: int) -> float:
        """An all-gather or a reduce-scatter of this many bytes in all."""
        if gpus == 1:
            return 0.0
        bandwidth = self.inside if gpus <= self.gpus_per_host else min(self.inside, self.network)
        return (gpus - 1) / gpus * size_bytes / bandwidth + math.log2(gpus) * LATENCY_SEC


CLUSTERS = (
    Cluster("H100 SXM, 8 a host, 8 x 400 Gbit/s", 8, 989e12, 450e9, 400e9),
    Cluster("H100 SXM, 8 a host, 1 x 400 Gbit/s", 8, 989e12, 450e9, 50e9),
    Cluster("A800 PCIe, 4 a host, 1 x 100 Gbit/s", 4, 312e12, 25e9, 12.5e9),
)


@dataclass(frozen=True)
class Step:
    """What a GPU does in an optimizer step."""

    shape: ModelShape
    trainable: Trainable
    rows: int  # of a micro-batch
    micro_batches: int
    seq_len: int = 4096

    def compute_sec(self, cluster: Cluster) -> tuple[float, float]:
        """(forward, backward) seconds of a micro-batch, without checkpointing."""
        flops = token_flops(self.shape, self.trainable, self.seq_len)
        tokens = self.rows * self.seq_len
        forward = flops.model / 3
        rate = cluster.peak_flops * MFU
        return forward * tokens / rate, (flops.executed - forward) * tokens / rate

    def ddp_sec(self, cluster: Cluster, gpus: int) -> float:
        forward, backward = self.compute_sec(cluster)
        reduce = 2 * cluster.collective_sec(FP32_BYTES * self.trainable.params(self.shape), gpus)
        return (self.micro_batches - 1) * (forward + backward) + forward + max(backward, reduce)

    def fsdp_sec(self, cluster: Cluster, gpus: int) -> float:
        forward, backward = self.compute_sec(cluster)
        gather, reduce = self.layer_sec(cluster, gpus)
        layers = self.shape.num_hidden_layers
        first = gather  # nothing to hide behind
        return self.micro_batches * (first + max(forward, layers * gather) + max(backward, layers * (gather + reduce)))

    def layer_sec(self, cluster: Cluster, gpus: int) -> tuple[float, float]:
        """(gather, reduce) seconds of a layer, embedding and head shared out among the layers."""
        layers = self.shape.num_hidden_layers
        gather = cluster.collective_sec(HALF_BYTES * self.shape.total_params / layers, gpus)
        return gather, cluster.collective_sec(FP32_BYTES * self.trainable.params(self.shape) / layers, gpus)


def table(cluster: Cluster) -> Iterator[str]:
    """Markdown: share of the time that is arithmetic, by model, layout and number of GPUs (weak scaling)."""
    counts = [n for n in (4, 8, 16, 64, 256, 1024) if n >= cluster.gpus_per_host]
    yield f"| {cluster.name} | rows x micro-batches a GPU | {' | '.join(map(str, counts))} |"
    yield f"|---|---|{'---|' * len(counts)}"
    for name, rows, micro_batches in itertools.product(("Qwen2.5-3B", "Qwen2.5-7B"), (2,), (1, 8)):
        step = Step(known_shape(f"Qwen/{name}"), Trainable.of("all"), rows, micro_batches)
        for layout, seconds in (("DDP", step.ddp_sec), ("FSDP2", step.fsdp_sec)):
            alone = micro_batches * sum(step.compute_sec(cluster))
            shares = [f"{alone / seconds(cluster, n):.0%}" for n in counts]
            yield f"| {name} {layout} | {rows} x {micro_batches} | {' | '.join(shares)} |"


def main() -> int:
    for cluster in CLUSTERS:
        print("\n".join(table(cluster)), end="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

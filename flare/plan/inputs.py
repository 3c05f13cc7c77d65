"""Everything that the plan of a run depends on, as one dataclass for ``dataclasses.replace``. No torch."""

from dataclasses import dataclass
from typing import Literal

from flare.plan.activations import Microbatch
from flare.plan.model_shape import FP32_BYTES, HALF_BYTES, ModelShape
from flare.plan.trainable import Trainable


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan depends on."""

    shape: ModelShape
    stage: int = 1
    nope_layers: tuple[int, ...] = ()
    trainable: Trainable | None = None  # None: the stage's default, stage 1 nope_layers, stage 2 everything
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    precision_reason: str = ""  # why this precision was chosen
    world_size: int = 1  # processes on all hosts, one a GPU
    parallel: Literal["ddp", "fsdp"] = "ddp"
    per_device_batch: int = 1  # rows of a micro-batch
    accumulation: int = 1  # micro-batches of an optimizer step
    seq_len: int = 4096  # tokens of a row
    gradient_checkpointing: bool | Literal["selective"] = False
    gpus: tuple[tuple[str, int | None], ...] = ()  # (name, memory_total_mib or None if unknown); empty: CPU
    optimizer: str = "adamw_torch_fused"
    attn_implementation: str = "sdpa"  # or eager
    document_mask: bool = True  # a mask separates documents, as in SDPA of packed rows
    balance: str = "auto"  # --balance: rows of each process
    save_total_limit: int | None = 3  # None: every checkpoint is kept
    keeps_best: bool = False  # the best checkpoint is kept whatever its age (early stopping)
    num_saves: int | None = None  # checkpoints that the complete run writes; None: not known
    steps_left: int | None = None  # of the stage; None: not known
    tokens_per_sec: float | None = None  # measured in this stage's last steps of this experiment
    free_disk_bytes: int | None = None  # in the output directory
    available_ram_bytes: int | None = None  # CPU runs, see read_available_ram
    processes_per_host: int | None = None  # CPU runs; None: all of them

    def __post_init__(self) -> None:
        assert self.precision in ("bf16", "fp16", "fp32"), self.precision
        assert min(self.world_size, self.per_device_batch, self.accumulation, self.seq_len) >= 1, self

    @property
    def resolved_trainable(self) -> Trainable:
        return self.trainable or Trainable.of(self.nope_layers if self.stage == 1 else "all")

    @property
    def shards(self) -> int:
        """Number of ranks among which weights, gradients and optimizer state are divided."""
        return self.world_size if self.parallel == "fsdp" else 1

    @property
    def half(self) -> bool:
        """Whether matmuls run in 16 bits. fp16 and bf16 need the same memory."""
        return self.precision in ("bf16", "fp16")

    @property
    def microbatch(self) -> Microbatch:
        return Microbatch(
            rows=self.per_device_batch,
            seq_len=self.seq_len,
            half=self.half,
            fp16=self.precision == "fp16",
            fp32_residual=self.resolved_trainable.everything and self.shards == 1,
            document_mask=self.document_mask,
            eager_attention=self.attn_implementation == "eager",
        )

    @property
    def global_batch_size(self) -> int:
        """Rows of an optimizer step."""
        return self.per_device_batch * self.accumulation * self.world_size

    @property
    def frozen_bytes(self) -> int:
        """Bytes of a frozen weight."""
        return HALF_BYTES if self.half else FP32_BYTES

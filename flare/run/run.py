"""A run as one value, resolved before any weight or document is loaded. The launcher and workers share it.

``flare.run.resolve`` creates it. This module does not import torch.
"""

import hashlib
import importlib.util
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flare.config.options import Options
from flare.config.parse import ResolvedOptions
from flare.cpu import read_available_ram
from flare.errors import ConfigError
from flare.gpus.nvidia_smi import Gpu
from flare.nope.config_json import theta_of, weight_files
from flare.plan.inputs import PlanInputs
from flare.plan.model_shape import ModelShape
from flare.plan.plan import Plan, make_plan
from flare.plan.trainable import Trainable
from flare.run.experiment import Experiment, existing_parent

FINGERPRINT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run: the GPUs of this node or the CPU, and the total numbers of processes and nodes."""

    use_cuda: bool
    world_size: int
    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1


@dataclass(frozen=True)
class Run:
    """A run as it is resolved before it starts."""

    resolved: ResolvedOptions
    hardware: Hardware
    experiment: Experiment
    init_from: Path | None  # None only in a dry run whose model has not been downloaded
    init_reason: str
    config: dict
    nope_layers: tuple[int, ...]
    trainable: Trainable
    precision: str
    global_batch_size: int
    precision_reason: str = "as requested"
    last_throughput: tuple[int, float | None] = (0, None)  # of this stage: ``metrics_file.last_throughput``

    @property
    def options(self) -> Options:
        return self.resolved.options

    @property
    def depth(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def micro_batch_size(self) -> int:
        """Rows that a process works on at once: the resolved ``--per_device_train_batch_size``."""
        return int(self.options.per_device_train_batch_size)

    @property
    def gradient_checkpointing(self) -> bool | str:
        """The resolved ``--gradient_checkpointing``: True, False or "selective"."""
        value = self.options.gradient_checkpointing
        return False if value == "auto" else value

    @property
    def parallel(self) -> str:
        """The resolved ``--parallel``: ddp or fsdp. A single process always uses ddp."""
        return "fsdp" if self.options.parallel == "fsdp" and self.hardware.world_size > 1 else "ddp"

    def with_layout(self, micro: int, checkpointing: bool | str, parallel: str) -> "Run":
        """The same run, with the same rows per step, but with this micro-batch, checkpointing, and ddp or fsdp."""
        resolved = self.resolved.with_values(
            per_device_train_batch_size=micro,
            gradient_checkpointing=checkpointing,
            parallel=parallel,
            global_batch_size=self.global_batch_size,
        )
        return replace(self, resolved=resolved)

    def shared_settings(self) -> dict[str, object]:
        """Settings that must be the same on all ranks of all nodes."""
        names = ("per_device_train_batch_size", "gradient_checkpointing", "parallel", "max_steps", "num_train_epochs")
        names += ("resume", "balance", "compile")
        return (
            {"experiment": str(self.experiment.root.absolute()), "global batch size": self.global_batch_size}
            | {f"--{name}": getattr(self.options, name) for name in names}
            | self.identity()
        )

    def identity(self) -> dict:
        """Values that must be the same when a run is resumed. The caller adds those of the data."""
        options = self.options
        return {
            "stage": options.stage,
            "model": model_fingerprint(self.init_from),
            "nope_layers": list(self.nope_layers),
            "rope_theta": theta_of(self.config, "model"),
            "train_layers": str(self.trainable),
            "max_seq_length": options.max_seq_length,
            "packing": options.packing,
            "seed": options.seed,
            "validation_split_percentage": options.validation_split_percentage,
            "precision": self.precision,
            "streaming_buffer_rows": options.streaming_buffer_rows if options.streaming else None,
        }

    def plan(self) -> Plan:
        """The memory, time and disk space that the run needs, from its configuration alone."""
        options, hardware = self.options, self.hardware
        micro = self.micro_batch_size
        steps_done, tokens_per_sec = self.last_throughput
        return make_plan(
            PlanInputs(
                shape=ModelShape.from_config(self.config, self.model_name),
                stage=options.stage,
                nope_layers=self.nope_layers,
                trainable=self.trainable,
                precision=self.precision,
                precision_reason=self.precision_reason,
                world_size=hardware.world_size,
                parallel=self.parallel,
                per_device_batch=micro,
                accumulation=-(-self.global_batch_size // (micro * hardware.world_size)),
                seq_len=options.max_seq_length,
                gradient_checkpointing=self.gradient_checkpointing,
                gpus=tuple((gpu.name, gpu.memory_total_mib) for gpu in hardware.gpus),
                optimizer=options.optim,
                balance=options.balance,
                attn_implementation=self.attention,
                document_mask=options.packing == "document" and self.attention == "sdpa",
                save_total_limit=options.save_total_limit,
                keeps_best=options.early_stopping_patience is not None,
                num_saves=-(-options.max_steps // options.save_steps) if options.max_steps else None,
                steps_left=max(options.max_steps - steps_done, 0) if options.max_steps else None,
                tokens_per_sec=tokens_per_sec,
                free_disk_bytes=shutil.disk_usage(existing_parent(self.experiment.root)).free,
                available_ram_bytes=None if hardware.use_cuda else read_available_ram(),
                processes_per_host=hardware.world_size // hardware.nodes,
            )
        )

    @property
    def attention(self) -> str:
        """The resolved ``--attn_implementation``."""
        return choose_attention(self.options.attn_implementation, self.hardware.use_cuda, self.precision)

    @property
    def model_name(self) -> str:
        """Directory of the model, or its name in the options while it is not downloaded."""
        return str(self.init_from or self.options.model_name_or_path)

    def settings(self) -> dict:
        """All options as JSON values."""
        return asdict(self.options)


def choose_attention(requested: str, use_cuda: bool, precision: str) -> str:
    """Resolve ``auto``: torch's flash kernel for packed rows on GPUs in bf16, SDPA everywhere else.

    Raises: ConfigError for a kernel that cannot run on this hardware.
    """
    has_flash = use_cuda and precision == "bf16"
    if requested == "auto":
        return "varlen" if has_flash else "sdpa"
    if requested in ("varlen", "flash_attention_2") and not has_flash:
        raise ConfigError(
            f"--attn_implementation {requested} runs on GPUs in bf16 only; use --attn_implementation sdpa"
        )
    if requested == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "--attn_implementation flash_attention_2 needs the flash-attn package, which is not installed: "
            "pip install flash-attn --no-build-isolation; or use varlen, which is part of torch"
        )
    return requested


def model_fingerprint(directory: Path) -> str:
    """Fingerprint of a model on disk: a hash of the sizes and the first and last 64 KiB of its weight files.

    A safetensors file begins with the names, shapes and offsets of all tensors. Hashing 60 GB at each start would take
    a minute, and a resumed run reads its weights from the checkpoint anyway.
    """
    digest = hashlib.sha256()
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES), os.SEEK_SET)
            digest.update(file.read(FINGERPRINT_BYTES))
    return digest.hexdigest()[:32]

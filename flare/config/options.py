"""Every training option, declared once: type, default, section of the JSON file, help text, limits.

``--help``, validation, the keys of the JSON file and docs/options.md derive from these fields. Nothing here imports
torch, because ``--help`` must start in well under a second.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flare.config.validate import parse_layer_words, parse_lengths, parse_weights
from flare.gpus.selection import parse_gpu_ids
from flare.option_fields import option, option_fields

MODEL, DATA, TRAINING = "model_args", "data_args", "training_args"
SECTIONS = (MODEL, DATA, TRAINING)

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
SELECTIVE = "selective"
"""``--gradient_checkpointing`` that recomputes only cheap operations; True recomputes all, False none."""

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "adamw_torch_8bit")

STAGE_DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"learning_rate": 1e-4, "per_device_train_batch_size": 3, "max_steps": 1000},
    2: {
        "learning_rate": 3e-5,
        "per_device_train_batch_size": 2,
        "max_steps": 2000,
        "gradient_checkpointing": True,
    },
}
"""Defaults that differ between the stages; the environment, the file and the command line override them."""

run_option = partial(option, section=TRAINING, group="run")
hardware_option = partial(option, section=TRAINING, group="hardware")
model_option = partial(option, section=MODEL, group="model")
data_option = partial(option, section=DATA, group="data")
optimization_option = partial(option, section=TRAINING, group="optimization")
logging_option = partial(option, section=TRAINING, group="logging")


@dataclass
class Options:
    """The options of one training run. ``None`` means not set, unless the help says otherwise."""

    # -- what to run ------------------------------------------------------------------------------
    stage: int = run_option("1: train only the NoPE layers; 2: train all layers", 1, choices=(1, 2))
    experiment_name: str | None = run_option(
        "directory of this run under --base_output_dir", None, default_help="stageN_yyyymmdd_hhmmss"
    )
    base_output_dir: str = run_option(
        "directory of all experiments; the environment variable FLARE_OUTPUT_DIR also sets it", "/work/xiaoyonggao"
    )
    dry_run: bool = run_option("print the plan and the command, then exit without training", False)
    prepare_only: bool = run_option(
        "build the token cache of a run with these options, then exit without training; needs no GPU", False
    )
    resume: str = run_option(
        "auto: continue from the newest complete checkpoint; never: refuse an experiment that has checkpoints; "
        "or the directory of a checkpoint",
        "auto",
    )
    overwrite_output_dir: bool = run_option(
        "delete the contents of the experiment directory and start from the beginning", False
    )
    seed: int = run_option("seed of the row order", 42, ge=0, le=2**32 - 1)

    # -- hardware -----------------------------------------------------------------------------------
    gpu_type: str | None = hardware_option(
        "GPUs by words of their model name (A800, A40), auto for all free GPUs, or cpu",
        None,
        default_help="auto, or cpu on a machine without GPUs",
    )
    gpu_ids: list[int] | None = hardware_option(
        "GPUs by nvidia-smi's index: 0 1 2 3, or 0,1,2,3, or 0-3",
        None,
        parse=parse_gpu_ids,
        metavar="ID",
        default_help="see --gpu_type",
    )
    allow_busy_gpus: bool = hardware_option("also use GPUs that another process is using", False)
    nproc_per_node: int | None = hardware_option(
        "worker processes on this host", None, ge=1, default_help="one per GPU, 1 on the CPU"
    )
    precision: str = hardware_option(
        "bf16 and fp16: frozen weights in this precision, trainable weights in fp32; fp16 uses dynamic loss scaling; "
        "auto: bf16 on GPUs (fp16 if one is older than Ampere), fp32 on the CPU",
        "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    parallel: str = hardware_option(
        "ddp: a full copy of the model on every GPU; fsdp: weights, gradients and optimizer state sharded over the "
        "GPUs (FSDP2); auto: ddp if the plan says that it fits, otherwise fsdp",
        "auto",
        choices=("auto", "ddp", "fsdp"),
    )
    attn_implementation: str = hardware_option(
        "attention implementation; auto: varlen (torch's flash attention for packed rows) on GPUs in bf16, otherwise "
        "sdpa; flash_attention_2 needs the flash-attn package",
        "auto",
        choices=("auto", "sdpa", "eager", "varlen", "flash_attention_2"),
    )
    compile: bool = hardware_option(
        "compile each decoder layer with torch.compile; steps are faster, but the first one takes minutes", False
    )
    balance: str = hardware_option(
        "how the rows of a step are divided among the processes; auto: equally on GPUs of one model, by measured "
        "speed on different models; measure: always by measured speed; equal: equally; or one weight per rank (3,1). "
        "The global batch and the row order do not change",
        "auto",
    )
    ddp_timeout: int = hardware_option(
        "seconds that a collective may take before the run is ended as hung", 1800, ge=1
    )
    step_timeout: float = hardware_option(
        "seconds that a step may take, after the first two, before the run is ended as hung and the stacks of all "
        "ranks are written to logs/; raised to ten times the longest step so far, at most to --ddp_timeout",
        600.0,
        gt=0,
    )

    # -- model --------------------------------------------------------------------------------------
    model_name_or_path: str = model_option(
        "hub name or directory of a Qwen2, Qwen2.5 or Qwen3 model", "Qwen/Qwen2.5-3B"
    )
    no_rope_layers: list = model_option(
        "NoPE layers: indices and ranges (3 7 20-32), every:4 (layers 3, 7, 11, ...), none, or auto (layers 20-32 of "
        "36, scaled to the depth of the model)",
        ["auto"],
        parse=parse_layer_words,
        metavar="LAYER",
    )
    rope_theta: float | None = model_option(
        "RoPE base of the layers that keep RoPE", None, gt=0, default_help="the model's own"
    )
    train_layers: list | None = model_option(
        "layers to train: nope, nope_attention (only the attention of the NoPE layers), all, or layer indices",
        None,
        parse=parse_layer_words,
        metavar="LAYER",
        default_help="nope in stage 1, all in stage 2",
    )
    save_format: str = model_option(
        "format of the weights of final_model: safetensors (model.safetensors) or bin (pytorch_model.bin)",
        "safetensors",
        choices=("safetensors", "bin"),
    )

    # -- data ---------------------------------------------------------------------------------------
    dataset_name: str = data_option(
        "data set: a name on the hub, a .jsonl .json .txt .parquet .csv file (also compressed as .gz or .zst), a "
        "folder of such files, a glob in quotes, a folder made by save_to_disk, or embedded; several are separated by "
        "commas (a,b)",
        "togethercomputer/RedPajama-Data-1T-Sample",
    )
    dataset_weights: list[float] | None = data_option(
        "share of the training tokens of each data set (0.7,0.3); required for several data sets with --streaming",
        None,
        parse=parse_weights,
        metavar="W",
        default_help="in proportion to their sizes, so that each row is used once an epoch",
    )
    dataset_config: str | None = data_option(
        "configuration of a hub data set", None, default_help="the data set's default"
    )
    dataset_split: str = data_option("split of a hub or saved data set", "train")
    dataset_revision: str | None = data_option(
        "revision of a hub data set: commit, tag or branch", None, default_help="its newest"
    )
    text_column: str = data_option(
        "column that contains the text; for several data sets one name for all, or one for each (text,body)", "text"
    )
    dataset_size: int | None = data_option(
        "use only the first N documents of each data set", None, ge=1, default_help="all"
    )
    validation_split_percentage: float = data_option(
        "percentage of the documents that is held out for evaluation; 0.1 is one document in a thousand",
        0.1,
        gt=0,
        lt=100,
    )
    streaming: bool = data_option("tokenize while training, for data larger than the disk; needs --max_steps", False)
    streaming_buffer_rows: int = data_option(
        "rows that --streaming shuffles together; up to three times as many are on disk", 16384, ge=1
    )
    max_seq_length: int = data_option("length of a packed row in tokens", 4096, ge=8)
    packing: str = data_option(
        "document: attention and positions restart at each document of a row; concat: a row is one sequence",
        "document",
        choices=("document", "concat"),
    )
    max_bad_rows: float = data_option(
        "largest accepted share of rows without usable text; 0.001 is one row in a thousand", 0.001, ge=0, le=1
    )
    preprocessing_num_workers: int | None = data_option(
        "processes that tokenize", None, ge=1, default_help="one per CPU core"
    )
    cache_dir: str | None = data_option(
        "directory of downloads and token caches",
        None,
        default_help="the hub's own cache for downloads, ~/.cache/flare for tokens",
    )

    # -- optimization -------------------------------------------------------------------------------
    learning_rate: float = optimization_option(
        "peak learning rate", None, gt=0, le=0.1, default_help="1e-4 in stage 1, 3e-5 in stage 2"
    )
    per_device_train_batch_size: int | str = optimization_option(
        "rows in a micro-batch of one process; auto: as many as fit on the smallest GPU, with the global batch kept "
        "by gradient accumulation",
        None,
        words=("auto",),
        ge=1,
        default_help="3 in stage 1, 2 in stage 2",
    )
    gradient_accumulation_steps: int = optimization_option("micro-batches in an optimizer step", 1, ge=1)
    global_batch_size: int | None = optimization_option(
        "rows in an optimizer step over all processes; sets the gradient accumulation",
        None,
        ge=1,
        default_help="processes x micro-batch x accumulation steps",
    )
    max_steps: int | None = optimization_option(
        "number of optimizer steps", None, ge=1, default_help="1000 in stage 1, 2000 in stage 2"
    )
    num_train_epochs: float | None = optimization_option(
        "passes over the data, instead of --max_steps", None, gt=0, default_help="not set"
    )
    lr_scheduler_type: str = optimization_option(
        "learning-rate schedule, named as in transformers", "cosine", choices=SCHEDULES
    )
    warmup_steps: int = optimization_option("steps of linear warm-up", 0, ge=0)
    warmup_ratio: float = optimization_option("linear warm-up as a share of all steps", 0.0, ge=0, le=1)
    optim: str = optimization_option(
        "optimizer; adamw_torch_8bit stores its state in 8 bits, 2 instead of 8 bytes per trainable parameter, and "
        "needs the torchao package",
        "adamw_torch_fused",
        choices=OPTIMIZERS,
    )
    weight_decay: float = optimization_option(
        "decoupled weight decay of weight matrices; norms and biases have none", 0.0, ge=0
    )
    adam_beta1: float = optimization_option("decay rate of Adam's first moment", 0.9, ge=0, lt=1)
    adam_beta2: float = optimization_option("decay rate of Adam's second moment", 0.999, ge=0, lt=1)
    adam_epsilon: float = optimization_option("Adam's epsilon", 1e-8, gt=0)
    max_grad_norm: float = optimization_option(
        "largest gradient norm, above which gradients are clipped; 0 turns clipping off", 1.0, ge=0
    )
    skip_nonfinite: int = optimization_option(
        "steps to skip because the loss or a gradient is not finite, before the run ends with an error; each skipped "
        "step is logged, with its rows in logs/",
        0,
        ge=0,
    )
    gradient_checkpointing: bool | str = optimization_option(
        "recompute activations in the backward pass to save memory; true: all; selective: all except matrix products "
        "and attention, which costs little time; auto: the first of false, selective and true that fits",
        "auto",
        words=(SELECTIVE, "auto"),
        default_help="auto in stage 1, true in stage 2",
    )

    # -- logging, evaluation, checkpoints --------------------------------------------------------------
    logging_steps: int = logging_option("steps between log lines", 10, ge=1)
    eval_steps: int | None = logging_option("steps between evaluations on the held-out documents", 100, ge=1)
    max_eval_samples: int | None = logging_option(
        "rows in an evaluation during training", None, ge=1, default_help="all held-out rows"
    )
    eval_context_lengths: list | None = logging_option(
        "context lengths in tokens (512,1024,4096); the last tokens of long held-out documents are also evaluated "
        "with each of these",
        None,
        parse=parse_lengths,
        metavar="N",
        default_help="none",
    )
    save_steps: int = logging_option("steps between checkpoints", 500, ge=1)
    save_total_limit: int | None = logging_option(
        "number of checkpoints to keep; the newest and, with early stopping, the best are always kept", 3, ge=1
    )
    early_stopping_patience: int | None = logging_option(
        "stop after this many evaluations without improvement; final_model is then the best model",
        None,
        ge=1,
        default_help="off",
    )
    early_stopping_threshold: float = logging_option(
        "smallest decrease of the evaluation loss, in nats per token, that counts as an improvement", 0.0, ge=0
    )

    @property
    def experiment_dir(self) -> Path:
        assert self.experiment_name is not None
        return Path(self.base_output_dir) / self.experiment_name


FIELDS = option_fields(Options)

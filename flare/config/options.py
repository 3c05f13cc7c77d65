"""Every training option, said once: type, default, section of the JSON file, help line.

``--help``, the validation in ``flare.config.parse`` and the JSON keys derive from
the fields below. No torch here: ``--help`` must start in well under a second.
"""

from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

MODEL, DATA, TRAINING = "model_args", "data_args", "training_args"

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
SELECTIVE = "selective"
"""``--gradient_checkpointing`` that recomputes what is cheap; True recomputes all, False nothing."""

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
"""What the guide ships for each stage; the lowest rank of precedence."""


def option(section: str, group: str, help: str, default: Any = MISSING, **rules: Any) -> Any:
    """A field with its section, help group and rules (``kind``, ``choices``, ``low``, ``high``, ``many``)."""
    metadata = {"section": section, "group": group, "help": help, **rules}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


run_option = partial(option, TRAINING, "run")
hardware_option = partial(option, TRAINING, "hardware")
model_option = partial(option, MODEL, "model")
data_option = partial(option, DATA, "data")
optimisation_option = partial(option, TRAINING, "optimisation")
logging_option = partial(option, TRAINING, "logging")


@dataclass
class Options:
    """The resolved options of one training run. ``None`` means not set unless the help says otherwise."""

    # -- what to run ------------------------------------------------------------------------------
    stage: int = run_option("1: train the NoPE layers only; 2: train everything", 1, kind="int", choices=(1, 2))
    experiment_name: str | None = run_option(
        "directory of this run under --base_output_dir; default stage<STAGE>_<date_time>", None
    )
    base_output_dir: str = run_option("where experiments live (environment: FLARE_OUTPUT_DIR)", "/work/xiaoyonggao")
    dry_run: bool = run_option("print the plan and the command, start nothing", False, kind="bool")
    prepare_only: bool = run_option(
        "make the token cache that a run with these options starts from, on a machine with or without GPUs, and end",
        False,
        kind="bool",
    )
    resume: str = run_option(
        "auto: go on from the newest complete checkpoint; never: refuse an experiment that has some; "
        "or a checkpoint directory",
        "auto",
    )
    overwrite_output_dir: bool = run_option(
        "delete what this experiment directory holds and start anew", False, kind="bool"
    )
    seed: int = run_option("seed of the row order", 42, kind="int", low=0, high=2**32 - 1)

    # -- hardware -----------------------------------------------------------------------------------
    gpu_type: str | None = hardware_option(
        "GPUs by words of their model name (A800, A40), auto: all free ones, cpu: none; "
        "default auto where there are GPUs, else cpu",
        None,
    )
    gpu_ids: list[int] | None = hardware_option(
        "GPUs by nvidia-smi's index: 0 1 2 3 or 0,1,2,3 or 0-3", None, kind="ids", many=True
    )
    allow_busy_gpus: bool = hardware_option("take GPUs that another process uses, too", False, kind="bool")
    nproc_per_node: int | None = hardware_option(
        "worker processes; default one per GPU, 1 on cpu", None, kind="int", low=1
    )
    precision: str = hardware_option(
        "auto: bf16 on GPUs (fp16 if one is older than Ampere), fp32 on the CPU. bf16, fp16: frozen weights in it, "
        "trainable ones as fp32 masters; fp16 with dynamic loss scaling",
        "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    parallel: str = hardware_option(
        "ddp: the whole model on every GPU; fsdp: weights, gradients and optimizer state divided among the GPUs "
        "(FSDP2); auto: ddp where the plan says that it fits",
        "auto",
        choices=("auto", "ddp", "fsdp"),
    )
    attn_implementation: str = hardware_option(
        "attention code; auto: varlen (torch's flash kernel, told document bounds) on GPUs in bf16, else sdpa; "
        "flash_attention_2 needs the flash-attn package",
        "auto",
        choices=("auto", "sdpa", "eager", "varlen", "flash_attention_2"),
    )
    compile: bool = hardware_option(
        "compile each decoder layer (torch.compile): faster steps after a first one that takes minutes",
        False,
        kind="bool",
    )
    balance: str = hardware_option(
        "rows of a step for each process; auto: equal on like GPUs, by speed (measured at the start) on unlike ones; "
        "measure: measure like GPUs, too; equal; or weights by rank (3,1). Batch and order stay the same",
        "auto",
    )
    ddp_timeout: int = hardware_option(
        "seconds a collective may take before the run is called hung", 1800, kind="int", low=1
    )
    step_timeout: float = hardware_option(
        "seconds a step may take, after the first two, before the run is called hung and ended with the stacks of "
        "all ranks in logs/; ten times the longest step so far if that is more, never over --ddp_timeout",
        600.0,
        kind="float",
        above=0,
    )

    # -- model --------------------------------------------------------------------------------------
    model_name_or_path: str = model_option(
        "hub name or directory of a Qwen2, Qwen2.5 or Qwen3 model", "Qwen/Qwen2.5-3B"
    )
    no_rope_layers: list = model_option(
        "NoPE layers: indices and ranges (3 7 20-32), every:4 (3, 7, 11, ...), auto (the band "
        "20-32 of 36, scaled to the model's depth) or none",
        ["auto"],
        kind="layers",
        many=True,
    )
    rope_theta: float | None = model_option(
        "RoPE base of the layers that keep RoPE; default: the model's own", None, kind="float", above=0
    )
    train_layers: list | None = model_option(
        "what trains: nope (default in stage 1), nope_attention, all (default in stage 2), or layer indices",
        None,
        kind="layers",
        many=True,
    )
    save_format: str = model_option(
        "weights of final_model: model.safetensors or pytorch_model.bin", "safetensors", choices=("safetensors", "bin")
    )

    # -- data ---------------------------------------------------------------------------------------
    dataset_name: str = data_option(
        "hub name; .jsonl .json .txt .parquet .csv file (.gz and .zst, too), a folder of them or a glob in quotes; "
        "folder of save_to_disk; or embedded; several by commas: a,b",
        "togethercomputer/RedPajama-Data-1T-Sample",
    )
    dataset_weights: list[float] | None = data_option(
        "shares of the training tokens of several data sets: 0.7,0.3; default in proportion to their size, every "
        "row once an epoch (--streaming needs shares)",
        None,
        kind="weights",
        many=True,
    )
    dataset_config: str | None = data_option("configuration of a hub data set", None)
    dataset_split: str = data_option("split of a hub or saved data set", "train")
    dataset_revision: str | None = data_option(
        "revision of a hub data set: commit, tag or branch; default its newest", None
    )
    text_column: str = data_option(
        "column that holds the text; of several data sets one for all, or one each: text,body", "text"
    )
    dataset_size: int | None = data_option(
        "use the first N documents only (of each data set)", None, kind="int", low=1
    )
    validation_split_percentage: float = data_option(
        "percent of the documents (0.1 is one in a thousand) held out for evaluation",
        0.1,
        kind="float",
        above=0,
        below=100,
    )
    streaming: bool = data_option(
        "tokenise ahead while training, for data larger than the disk; needs --max_steps", False, kind="bool"
    )
    streaming_buffer_rows: int = data_option(
        "rows that are shuffled together with --streaming; three times as many lie on disk at most",
        16384,
        kind="int",
        low=1,
    )
    max_seq_length: int = data_option("tokens of a packed row", 4096, kind="int", low=8)
    packing: str = data_option(
        "document: attention and positions restart at each document; concat: plain concatenation",
        "document",
        choices=("document", "concat"),
    )
    max_bad_rows: float = data_option(
        "share of rows without usable text that is tolerated", 0.001, kind="float", low=0, high=1
    )
    preprocessing_num_workers: int | None = data_option("cores that tokenise; default all", None, kind="int", low=1)
    cache_dir: str | None = data_option(
        "hub downloads and token caches; default ~/.cache/flare (tokens) and the hub's own", None
    )

    # -- optimisation -------------------------------------------------------------------------------
    learning_rate: float = optimisation_option(
        "peak learning rate; default 1e-4 in stage 1, 3e-5 in stage 2", None, kind="float", above=0, high=0.1
    )
    per_device_train_batch_size: int | str = optimisation_option(
        "rows a process works on at once; auto: as many as fit the smallest GPU; the rows of a step stay those of "
        "--global_batch_size or of the default, the rest is accumulated; default 3 in stage 1, 2 in stage 2",
        None,
        kind="count",
        low=1,
    )
    gradient_accumulation_steps: int = optimisation_option("micro-batches of an optimizer step", 1, kind="int", low=1)
    global_batch_size: int | None = optimisation_option(
        "rows of an optimizer step over all processes; sets the accumulation", None, kind="int", low=1
    )
    max_steps: int | None = optimisation_option(
        "optimizer steps; default 1000 in stage 1, 2000 in stage 2", None, kind="int", low=1
    )
    num_train_epochs: float | None = optimisation_option(
        "passes over the data instead of --max_steps", None, kind="float", above=0
    )
    lr_scheduler_type: str = optimisation_option("schedule, as transformers names them", "cosine", choices=SCHEDULES)
    warmup_steps: int = optimisation_option("steps of linear warm-up", 0, kind="int", low=0)
    warmup_ratio: float = optimisation_option("warm-up as a share of all steps", 0.0, kind="float", low=0, high=1)
    optim: str = optimisation_option(
        "optimizer; adamw_torch_8bit holds its moments in 8 bits, 2 bytes a trainable parameter instead of 8 (needs "
        "the torchao package)",
        "adamw_torch_fused",
        choices=OPTIMIZERS,
    )
    weight_decay: float = optimisation_option(
        "decoupled weight decay of matrices (norms and biases have none)", 0.0, kind="float", low=0
    )
    adam_beta1: float = optimisation_option("Adam's first moment decay", 0.9, kind="float", low=0, below=1)
    adam_beta2: float = optimisation_option("Adam's second moment decay", 0.999, kind="float", low=0, below=1)
    adam_epsilon: float = optimisation_option("Adam's epsilon", 1e-8, kind="float", above=0)
    max_grad_norm: float = optimisation_option(
        "gradients are clipped to this norm; 0 turns clipping off", 1.0, kind="float", low=0
    )
    skip_nonfinite: int = optimisation_option(
        "steps that may be left out because loss or gradient is not finite; each is named, its rows are in logs/; one "
        "more ends the run",
        0,
        kind="int",
        low=0,
    )
    gradient_checkpointing: bool | str = optimisation_option(
        "recompute activations in the backward pass of layers that have one; selective: all but matrix products and "
        "attention, which costs little time; auto: the least that the plan finds to fit, none, selective or all; "
        "default auto in stage 1, on in stage 2",
        "auto",
        kind="switch",
    )

    # -- logging, evaluation, checkpoints --------------------------------------------------------------
    logging_steps: int = logging_option("steps between log lines", 10, kind="int", low=1)
    eval_steps: int | None = logging_option(
        "steps between evaluations on the held-out documents; default 100", 100, kind="int", low=1
    )
    max_eval_samples: int | None = logging_option(
        "rows of an evaluation during training; default all held-out rows", None, kind="int", low=1
    )
    eval_context_lengths: list | None = logging_option(
        "also evaluate the last tokens of long held-out documents with so much context (512,1024,4096); default off",
        None,
        kind="lengths",
        many=True,
    )
    save_steps: int = logging_option("steps between checkpoints", 500, kind="int", low=1)
    save_total_limit: int | None = logging_option(
        "checkpoints kept (the newest and, with early stopping, the best always are)", 3, kind="int", low=1
    )
    early_stopping_patience: int | None = logging_option(
        "stop after so many evaluations without improvement; final_model is then the best one; default off",
        None,
        kind="int",
        low=1,
    )
    early_stopping_threshold: float = logging_option(
        "an evaluation loss must fall by more than this to count as improvement", 0.0, kind="float", low=0
    )

    @property
    def experiment_dir(self) -> Path:
        assert self.experiment_name is not None
        return Path(self.base_output_dir) / self.experiment_name


FIELDS = {f.name: f for f in fields(Options)}
SECTIONS = (MODEL, DATA, TRAINING)
GROUPS = ("run", "hardware", "model", "data", "optimisation", "logging")

"""Resolve a run from options and files, before any weight or document is loaded.

The launcher and every worker call ``resolve_run`` and get the same ``Run``. Nothing is written here.
"""

import functools
import itertools
from copy import deepcopy
from pathlib import Path

from flare.config.options import SELECTIVE, Options
from flare.config.parse import ResolvedOptions
from flare.errors import CheckpointError, ConfigError, EnvError
from flare.gpus.specs import lacks_bf16
from flare.hub import local_model_dir, read_hub_config, read_model_config
from flare.nope.canary.file import check_recorded_layers
from flare.nope.config_json import nope_layers_of, reject_custom_code, theta_of, weight_files, with_nope
from flare.nope.layers import format_layers, parse_layers
from flare.plan.balance import parse_weights
from flare.plan.model_shape import ModelShape, known_shape
from flare.plan.optimizer_state import BLOCKS, EIGHT_BIT, block_size
from flare.plan.trainable import Trainable
from flare.run.batch import default_micro_batch, global_batch_size, micro_batch_choices
from flare.run.experiment import Experiment, check_is_directory, check_output_dir, stage1_result
from flare.run.metrics_file import last_throughput
from flare.run.optional_packages import check_compiler, check_torchao
from flare.run.run import Hardware, Run, choose_attention


def resolve_run(resolved: ResolvedOptions, hardware: Hardware) -> Run:
    """Resolve the model, its layers, the model to start from, the batch sizes and the memory layout.

    Raises: subclasses of FlareError for all errors that can be found without loading weights. No file is changed.
    """
    options = resolved.options
    check_output_dir(options.base_output_dir)
    check_is_directory(options.experiment_dir)
    _check_resume(options.resume)
    parse_weights(options.balance, hardware.world_size)
    experiment = Experiment(options.experiment_dir)
    _check_stage_order(experiment, options)
    name, reason = choose_init_from(resolved, experiment)
    init_from, raw = open_model(name, options)
    where = str(init_from or name)
    _check_overwrite(experiment, options, init_from)
    nope_layers = choose_nope_layers(resolved, raw, where)
    if nope_layers_of(raw):
        resolved = use_theta_of_model(resolved, raw, where)
        options = resolved.options
    config = with_nope(raw, nope_layers, options.rope_theta, where)
    _check_length(options, config)
    depth = int(config["num_hidden_layers"])
    precision, precision_reason = choose_precision(options.precision, hardware)
    run = Run(
        resolved=resolved,
        hardware=hardware,
        experiment=experiment,
        init_from=init_from,
        init_reason=reason,
        config=config,
        nope_layers=tuple(nope_layers),
        trainable=Trainable.parse(options.train_layers, options.stage, nope_layers, depth),
        precision=precision,
        precision_reason=precision_reason,
        last_throughput=(0, None) if options.overwrite_output_dir else last_throughput(experiment, options.stage),
        global_batch_size=global_batch_size(options, hardware.world_size, experiment.saved_global_batch_size()),
    )
    choose_attention(options.attn_implementation, hardware.use_cuda, run.precision)
    if options.compile:
        check_compiler(hardware.use_cuda)
    if options.optim == EIGHT_BIT:
        _check_8bit(run)
    return resolve_layout(run)


def _check_8bit(run: Run) -> None:
    """Raises: EnvError when a package is missing; ConfigError when no moment would be in 8 bits."""
    check_torchao(run.hardware.use_cuda)
    if not any(map(block_size, run.trainable.tensors(ModelShape.from_config(run.config)))):
        raise ConfigError(
            f"--optim {EIGHT_BIT} would have no moment in 8 bits: no trainable matrix has rows of a multiple of "
            f"{min(BLOCKS)} numbers; use --optim adamw_torch_fused"
        )


def _check_resume(resume: str) -> None:
    """Check that the checkpoint of ``--resume PATH`` exists. Its files are verified when it is opened."""
    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise CheckpointError(f"--resume {resume} is not a complete checkpoint (no manifest.json)")


def resolve_layout(run: Run) -> Run:
    """Resolve ``auto`` for micro-batch, gradient checkpointing and ddp or fsdp to the first choice that fits.

    The rows of a step stay the same: a smaller micro-batch means more gradient accumulation. Smaller micro-batches are
    tried first. Selective checkpointing comes next, then full checkpointing, which runs the forward pass of trainable
    layers twice. Sharding comes last, because it sends every weight to every rank three times per micro-batch.
    Values that the user gave are kept. If nothing fits, ``check_fits`` raises the error later, with numbers.
    """
    options, processes = run.options, run.hardware.world_size
    sizes = micro_batch_choices(options, run.global_batch_size, processes)
    given = options.gradient_checkpointing
    switches = (False, SELECTIVE, True) if given == "auto" else (given,)
    layouts = (options.parallel,) if options.parallel != "auto" else ("ddp", "fsdp")[: 2 if processes > 1 else 1]
    if run.with_layout(sizes[-1], switches[0], layouts[0]).plan().fits is None:  # the memory of the GPUs is unknown
        sizes = [size for size in sizes if size <= default_micro_batch(options)] or sizes  # at most the default size
    tried = run
    for parallel, checkpointing, size in itertools.product(layouts, switches, sizes):
        tried = run.with_layout(size, checkpointing, parallel)
        if tried.plan().fits is not False:
            return tried
    return tried


def _check_overwrite(experiment: Experiment, options: Options, init_from: Path | None) -> None:
    """Check that ``--overwrite_output_dir`` does not delete the model or checkpoint that the run starts from."""
    if not options.overwrite_output_dir:
        return
    overwritten = [path.resolve() for path in experiment.paths_to_overwrite(options.stage)]
    starts = [init_from] if init_from else []
    if options.resume not in ("auto", "never"):
        starts.append(Path(options.resume))
    for start in starts:
        if any(path == start.resolve() or path in start.resolve().parents for path in overwritten):
            raise ConfigError(
                f"--overwrite_output_dir would delete {start}, which the run starts from; choose another "
                "--experiment_name"
            )


def open_model(name: str, options: Options) -> tuple[Path | None, dict]:
    """(directory, config.json) of the model to start from. A dry run needs no weights and may return None first.

    Raises: ConfigError, CheckpointError or EnvError when the model does not exist or has no weights.
    """
    if options.dry_run and not Path(name).is_dir():
        return None, deepcopy(hub_model_config(name, options.cache_dir))
    directory = local_model_dir(name, options.cache_dir)
    raw = read_model_config(directory)
    reject_custom_code(raw, str(directory))
    ModelShape.from_config(raw, str(directory))  # raises for other model families and missing sizes
    weight_files(directory)
    check_recorded_layers(directory, nope_layers_of(raw))
    return directory, raw


@functools.cache  # a plan opens its model twice, and an unreachable hub takes half a minute to fail
def hub_model_config(name: str, cache_dir: str | None) -> dict:
    """config.json of a hub model, without its weights. Known Qwen models do not need the hub."""
    try:
        return read_hub_config(name, cache_dir)
    except EnvError:
        if name.removeprefix("Qwen/").startswith("Qwen") and (shape := known_shape(name)):
            return shape.to_config()
        raise


def _check_stage_order(experiment: Experiment, options: Options) -> None:
    has_stage2 = experiment.recorded_stage() == 2 or experiment.stage1.exists()
    if has_stage2 and options.stage == 1 and not options.overwrite_output_dir:
        raise ConfigError(
            f"experiment {experiment.root.name!r} is in stage 2 already; choose another --experiment_name "
            "for a new stage 1, or --overwrite_output_dir"
        )


def choose_init_from(resolved: ResolvedOptions, experiment: Experiment) -> tuple[str, str]:
    """(name or directory of the model that a stage starts from, sentence for the log that says why).

    For stage 2 the order is that of the contract (section 3).
    """
    options = resolved.options
    name = options.model_name_or_path
    if options.stage == 2 and not resolved.is_set_for_stage("model_name_or_path"):
        result = stage1_result(experiment)
        if result is not None:
            # When the user reads this, the experiment's own result has moved: Experiment.move_results_to_stage1.
            place = experiment.stage1 / "final_model" if result == experiment.final_model else result
            return str(result), f"stage 2 starts from the result of stage 1: {place}"
        reason = f"warning: no stage 1 result for {experiment.root.name!r}; stage 2 starts from the base model {name}"
    else:
        reason = f"stage {options.stage} starts from {name}"
    return name, reason


def choose_nope_layers(resolved: ResolvedOptions, raw: dict, where: str) -> list[int]:
    """NoPE layers of the run: those of the model that it starts from, otherwise those in the options.

    Raises: ConfigError when the command line contradicts a model that has NoPE layers already.
    """
    options = resolved.options
    existing = nope_layers_of(raw)
    depth = int(raw["num_hidden_layers"])
    if not existing:
        return parse_layers(options.no_rope_layers, depth)
    if resolved.is_on_command_line("no_rope_layers"):
        requested = parse_layers(options.no_rope_layers, depth)
        if requested != existing:
            raise ConfigError(
                f"--no_rope_layers {format_layers(requested)} contradicts {where}, whose NoPE layers are "
                f"{format_layers(existing)}; leave the flag out"
            )
    return existing


def use_theta_of_model(resolved: ResolvedOptions, raw: dict, where: str) -> ResolvedOptions:
    """Set ``rope_theta`` to that of a model which already has NoPE layers, because it was trained with it.

    Raises: ConfigError when the command line gives another value.
    """
    theta, requested = theta_of(raw, where), resolved.options.rope_theta
    if resolved.is_on_command_line("rope_theta") and requested != theta:
        raise ConfigError(
            f"--rope_theta {requested:g} contradicts {where}, whose rope_theta is {theta:g}; leave the flag out"
        )
    return resolved.with_values(rope_theta=theta)


def _check_length(options: Options, config: dict) -> None:
    limit = config.get("max_position_embeddings")
    if limit and options.max_seq_length > limit:
        raise ConfigError(f"--max_seq_length {options.max_seq_length} is above the model's {limit} positions")


def choose_precision(requested: str, hardware: Hardware) -> tuple[str, str]:
    """(precision, reason). ``auto`` is bf16 on GPUs, fp16 if one of them is older than Ampere, and fp32 on the CPU.

    Raises: ConfigError for bf16 on a GPU without bf16.
    """
    old = next((f"GPU {gpu.index} ({gpu.name})" for gpu in hardware.gpus if lacks_bf16(gpu.name)), None)
    if requested == "bf16" and old:
        raise ConfigError(f"--precision bf16: {old} is older than Ampere and has no bf16; use --precision fp16")
    if requested != "auto":
        return requested, "as requested"
    if not hardware.use_cuda:
        return "fp32", "auto on the CPU"
    if old:
        return "fp16", f"auto: {old} is older than Ampere and has no bf16"
    return "bf16", "auto on GPUs since Ampere"


def check_identity(now: dict, then: dict, where: str, explanations: dict[str, str | None] | None = None) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        now: identity of this run.
        then: identity in the checkpoint.
        where: name of the checkpoint, for the message.
        explanations: text for a key that differs, instead of both values.
    Raises: CheckpointError listing every difference.
    """
    explanations = explanations or {}
    differences = [f"{k}: {explanations.get(k) or f'{then.get(k)} -> {now[k]}'}" for k in now if then.get(k) != now[k]]
    if differences:
        raise CheckpointError(
            f"{where} belongs to another run ({'; '.join(differences)}); use the same settings, another "
            "--experiment_name, or --overwrite_output_dir to start again"
        )

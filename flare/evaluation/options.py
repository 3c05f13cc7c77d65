"""The options of evaluate_model_enhanced.py, each declared once. No torch."""

import argparse
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flare.argument_parser import OneLineParser, add_options, parse_options
from flare.config.validate import parse_lengths
from flare.errors import ConfigError
from flare.gpus.selection import parse_gpu_ids
from flare.option_fields import option, option_fields
from flare.option_values import parse_path, parse_words

DEFAULT_DATASETS = ("wikitext2", "c4", "lambada", "pg19")

DESCRIPTION = (
    "Evaluate a causal language model: perplexity, long contexts, retrieval. Writes JSON and a report with plots."
)
EXAMPLES = """\
examples:
  python evaluate_model_enhanced.py --model_path runs/mine/final_model \\
      --use_default_datasets
  python evaluate_model_enhanced.py --model_path runs/mine/final_model \\
      --datasets pg19 --passkey --context_lengths 1024,4096,16384 \\
      --compare_to Qwen/Qwen2.5-3B runs/control/final_model --gpu_ids 0 1 2 3
  python evaluate_model_enhanced.py --model_path runs/big/final_model \\
      --datasets my.jsonl --device auto
"""

model_option = partial(option, group="models and data")
perplexity_option = partial(option, group="perplexity")
task_option = partial(option, group="other measurements")
hardware_option = partial(option, group="hardware")


def parse_context_lengths(value: Any, where: str) -> tuple[int, ...]:
    """Token counts of ``--context_lengths``. Raises: ConfigError."""
    return tuple(parse_lengths(value, where))


def parse_task_names(value: Any, where: str) -> tuple[str, ...]:
    """Names of lm-eval tasks, separated by commas or spaces. Raises: ConfigError."""
    return tuple(name for word in parse_words(value, where) for name in word.replace(",", " ").split())


@dataclass(frozen=True)
class EvaluationSettings:
    """The options of an evaluation. ``resolve_settings`` fills in the default data sets and output directory."""

    # -- models and data --------------------------------------------------------------------------
    model_path: str = model_option("model to evaluate: directory or hub name of any causal LM", metavar="DIR")
    datasets: tuple[str, ...] = model_option(
        "data sets: wikitext2, c4, lambada, pg19, embedded, a local file, a hub data set as "
        "owner/name[:config[:split[:column]]], or NAME=FILE for a local copy of a named set (lambada=my.jsonl)",
        (),
        parse=parse_words,
        metavar="NAME",
        default_help="those of --use_default_datasets",
    )
    output_dir: Path | None = model_option(
        "directory of the results",
        None,
        parse=parse_path,
        metavar="DIR",
        default_help="evaluation/ in the experiment of the model",
    )
    compare_to: tuple[str, ...] = model_option(
        "further models to evaluate on the same documents", (), parse=parse_words, metavar="MODEL", default_help="none"
    )
    use_default_datasets: bool = model_option(
        f"evaluate on {', '.join(DEFAULT_DATASETS)}, in addition to --datasets", False
    )
    data_mirror: str | None = model_option(
        "directory that contains hub data sets as DIR/owner/name, read instead of the hub",
        None,
        metavar="DIR",
        default_help="the hub",
    )
    cache_dir: str | None = model_option(
        "directory of downloaded data sets and models", None, metavar="DIR", default_help="the hub's own cache"
    )
    max_samples_per_dataset: int | None = model_option(
        "use only the first N documents of each data set", None, ge=1, default_help="all"
    )
    min_tokens: int = model_option("a data set with fewer tokens is an error", 1, ge=1)

    # -- perplexity -------------------------------------------------------------------------------
    max_length: int = perplexity_option("length of the model's window in tokens", 2048, ge=1)
    stride: int | None = perplexity_option(
        "new tokens in each window; windows overlap if this is below --max_length",
        None,
        ge=1,
        default_help="no overlap",
    )
    protocol: str = perplexity_option(
        "document: each document alone; concat: all documents joined by the end-of-text token",
        "document",
        choices=("document", "concat"),
    )
    batch_size: int = perplexity_option("full windows in a batch", 1, ge=1)
    prefix_token_id: int | None = perplexity_option(
        "id of the token before the first one of a document",
        None,
        metavar="ID",
        default_help="bos token, or eos token if there is no bos token",
    )
    precision: str = perplexity_option(
        "precision of the weights; auto: bf16 on GPUs (fp16 if one is older than Ampere), fp32 on the CPU",
        "auto",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    attn_implementation: str = perplexity_option("attention implementation", "sdpa", choices=("sdpa", "eager"))
    seed: int = perplexity_option("seed of passkeys, text samples and bootstrap", 0)

    # -- other measurements -----------------------------------------------------------------------
    context_lengths: tuple[int, ...] = task_option(
        "context lengths in tokens (512,1024,4096); the loss of the same last tokens of long documents is measured "
        "with each of these; may exceed the model's max_position_embeddings",
        (),
        parse=parse_context_lengths,
        metavar="N,N,...",
        default_help="none",
    )
    passkey: bool = task_option(
        "test whether the model finds a number hidden in filler text, at several lengths and depths (RULER "
        "niah_single_1)",
        False,
    )
    passkey_samples: int = task_option("passkey texts for each length and depth", 5, ge=1)
    lm_eval_tasks: tuple[str, ...] = task_option(
        "lm-eval tasks, by name or .yaml file, separated by commas; needs pip install lm-eval",
        (),
        parse=parse_task_names,
        metavar="A,B",
        default_help="none",
    )
    lm_eval_limit: int | None = task_option(
        "use only the first N documents of each lm-eval task", None, ge=1, default_help="all"
    )
    generate_tokens: int = task_option("tokens in each generated text sample; 0: no samples", 64, ge=0)

    # -- hardware ---------------------------------------------------------------------------------
    device: str | None = hardware_option(
        "device of a single process: cpu, cuda or cuda:1; auto: one model spread over all GPUs",
        None,
        metavar="NAME",
        default_help="one process on each GPU",
    )
    gpu_type: str | None = hardware_option(
        "GPUs by words of their model name (A800), auto for all free GPUs, or cpu; one process on each",
        None,
        metavar="NAME",
        default_help="auto, or cpu on a machine without GPUs",
    )
    gpu_ids: list[int] | None = hardware_option(
        "GPUs by nvidia-smi's index, one process on each", None, parse=parse_gpu_ids, metavar="ID",
        default_help="see --gpu_type",
    )  # fmt: skip
    allow_busy_gpus: bool = hardware_option("also use GPUs that another process is using", False)
    nproc_per_node: int | None = hardware_option(
        "number of processes", None, ge=1, default_help="one per GPU, 1 on the CPU"
    )
    ddp_timeout: int = 1800  # seconds; not an option

    @property
    def passkey_lengths(self) -> tuple[int, ...]:
        """Context lengths of the passkey test: ``context_lengths``, or ``max_length`` if there are none."""
        return self.context_lengths or (self.max_length,)


FIELDS = option_fields(EvaluationSettings)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``evaluate_model_enhanced.py``."""
    parser = OneLineParser(
        "evaluate_model_enhanced.py", "--model_path DIR [--compare_to MODEL ...]", DESCRIPTION, EXAMPLES
    )
    add_options(parser, FIELDS)
    return parser


def resolve_settings(argv: list[str]) -> EvaluationSettings:
    """Settings of a command line.

    Raises: ConfigError for values that are wrong, alone or in combination.
    """
    settings = EvaluationSettings(**parse_options(build_parser(), FIELDS, argv))
    if settings.stride is not None and settings.stride > settings.max_length:
        raise ConfigError(
            f"--stride {settings.stride} is more than --max_length {settings.max_length}; windows would have gaps"
        )
    _check_device(settings)
    return replace(
        settings,
        datasets=_all_datasets(settings),
        output_dir=settings.output_dir or default_output_dir(settings.model_path),
    )


def _all_datasets(settings: EvaluationSettings) -> tuple[str, ...]:
    """Names of the data sets, the default ones first. ``NAME=FILE`` replaces the default set of that name."""
    named = settings.datasets
    replaced = {word.partition("=")[0] for word in named if "=" in word}
    use_default = settings.use_default_datasets or not named
    default = [name for name in DEFAULT_DATASETS if use_default and name not in replaced]
    return tuple(dict.fromkeys([*default, *named]))


def _check_device(settings: EvaluationSettings) -> None:
    """Refuse ``--device``, which is for one process, together with flags that choose GPUs for several."""
    device = settings.device
    if device is None:
        return
    if settings.gpu_type is not None or settings.gpu_ids is not None:
        raise ConfigError(f"--device {device} and --gpu_type/--gpu_ids both choose GPUs; give one of them")
    if settings.nproc_per_node not in (None, 1) and device != "cpu":
        raise ConfigError(f"--device {device} is for one process; for several give --gpu_ids, --gpu_type or cpu")


def default_output_dir(model_path: str) -> Path:
    """``evaluation/`` next to the directory of the model.

    Raises: ConfigError for a hub name, which has no directory.
    """
    path = Path(model_path)
    if not path.is_dir():
        raise ConfigError(f"--output_dir is needed: {model_path!r} is not a directory next to which results could go")
    return path.resolve().parent / "evaluation"

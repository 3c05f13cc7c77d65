"""The options of a training run, read from the command line, a JSON file and the environment. No torch.

Precedence: command line > ``--config`` file > environment > built-in defaults. All mistakes are reported at once,
each with the name that the user typed, the value and the nearest known name.
"""

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flare.argument_parser import OneLineParser, add_options, unknown_arguments
from flare.config.config_file import ConfigFile, read_config_file
from flare.config.options import FIELDS, STAGE_DEFAULTS, Options
from flare.config.validate import other_tools_name
from flare.errors import ConfigError, join_errors
from flare.files import REPO
from flare.option_values import check_values

DEFAULT_CONFIG = REPO / "training_config.json"

EXAMPLES = """examples:
  python train_qwen_multi_gpu.py --stage 1 --gpu_type A800 --experiment_name x
  python train_qwen_multi_gpu.py --stage 2 --gpu_ids 0 1 4 5 --experiment_name x
  python train_qwen_multi_gpu.py --stage 1 --gpu_type cpu --nproc_per_node 2 \\
      --model_name_or_path ./tiny_qwen --dataset_name embedded \\
      --base_output_dir ./runs --max_seq_length 256 --max_steps 20
  python train_qwen_multi_gpu.py --model_name_or_path Qwen/Qwen2.5-7B --dry_run
"""

COMMAND_LINE = "command line"
CLOCK = "clock"
"""Source of a default experiment name."""
RESOLVED = ", resolved"
"""End of the source of a value that was ``auto``, or a default that depends on the model or the machine."""


@dataclass
class ResolvedOptions:
    """Options, and the source of each value."""

    options: Options
    sources: dict[str, str]
    argv: list[str]
    warnings: list[str] = field(default_factory=list)

    def is_on_command_line(self, name: str) -> bool:
        """Whether the user set this option on the command line."""
        return self.sources.get(name) == COMMAND_LINE

    def is_set_for_stage(self, name: str) -> bool:
        """Whether the user set this option for this stage only: on the command line or in the file's stage block."""
        return self.is_on_command_line(name) or ": stages." in self.sources.get(name, "")

    @property
    def name_is_default(self) -> bool:
        """Whether the experiment's name was made from the time when this process started."""
        return self.sources.get("experiment_name") == CLOCK

    def with_experiment_name(self, name: str) -> "ResolvedOptions":
        """A copy with this experiment name, also in ``argv``: workers must not make a name from their own clock."""
        argv = [*self.argv, "--experiment_name", name]
        sources = self.sources | {"experiment_name": COMMAND_LINE}
        return ResolvedOptions(replace(self.options, experiment_name=name), sources, argv, self.warnings)

    def with_values(self, **values: Any) -> "ResolvedOptions":
        """A copy with these values; the source of each value that changes gets the ending ``RESOLVED``."""
        changed = [name for name, value in values.items() if getattr(self.options, name) != value]
        sources = {name: f"{self.sources.get(name, 'default').removesuffix(RESOLVED)}{RESOLVED}" for name in changed}
        return replace(self, options=replace(self.options, **values), sources=self.sources | sources)


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``train_qwen_multi_gpu.py``."""
    parser = OneLineParser(
        "train_qwen_multi_gpu.py",
        "[--stage N] [--gpu_type NAME | --gpu_ids ID ...]",
        "Train a Qwen model with NoPE layers, one stage at a time.",
        EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument_group("run").add_argument(
        "--config",
        metavar="FILE[#NAME]",
        help="JSON file with options, // comments allowed; #NAME selects one of the file's named configurations "
        "(default: training_config.json)",
    )
    add_options(parser, FIELDS)
    old = parser.add_argument_group("old names (of train_qwen-stage.py)")
    old.add_argument("--output_dir", metavar="DIR", help="--base_output_dir and --experiment_name in one path")
    old.add_argument("--stage1_max_seq_len", metavar="N", help="--max_seq_length")
    return parser


def resolve(argv: list[str]) -> ResolvedOptions:
    """Options of a command line.

    Raises: ConfigError with all problems found.
    """
    problems: list[str] = []
    warnings: list[str] = []
    parser = build_parser()
    parsed, unknown = parser.parse_known_args(argv)
    typed = vars(parsed)
    problems += unknown_arguments(parser, unknown, lambda flag: other_tools_name(flag.removeprefix("--"), "--"))
    typed |= _values_of_old_names(typed, warnings, problems)
    config = typed.pop("config", None)
    command_line = check_values(FIELDS, typed, lambda name: f"--{name}", problems, from_text=True)
    if config is None and not DEFAULT_CONFIG.exists():
        file = ConfigFile(DEFAULT_CONFIG.name)
    else:
        file = read_config_file(config or str(DEFAULT_CONFIG), problems)
    values, sources = _merge(_layers(file, command_line), problems)
    options = Options(**values)
    problems += impossible_combinations(options, sources)
    if problems:
        raise ConfigError(join_errors(problems))
    if "gradient_accumulation_steps" in command_line and options.global_batch_size is not None:
        warnings.append(
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps} has no effect: --global_batch_size "
            f"{options.global_batch_size} sets the rows of a step, and the accumulation follows from it"
        )
    if options.experiment_name is None:
        options.experiment_name = f"stage{options.stage}_{time.strftime('%Y%m%d_%H%M%S')}"
        sources["experiment_name"] = CLOCK
    return ResolvedOptions(options, sources, list(argv), warnings)


def _layers(file: ConfigFile, command_line: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(source, values) in order of rising precedence."""
    stage = command_line.get("stage") or file.values.get("stage") or 1
    output_dir = os.environ.get("FLARE_OUTPUT_DIR")
    return [
        ("default", STAGE_DEFAULTS.get(stage, {})),
        ("environment", {"base_output_dir": output_dir} if output_dir else {}),
        (file.name, file.values),
        (f"{file.name}: stages.{stage}", file.by_stage.get(str(stage), {})),
        (COMMAND_LINE, command_line),
    ]


def _values_of_old_names(typed: dict[str, Any], warnings: list[str], problems: list[str]) -> dict[str, Any]:
    """Take the old names out of ``typed``; returns the same values under their new names.

    An old and a new name with different values are a problem.
    """
    new: dict[str, Any] = {}
    if "output_dir" in typed:
        path = Path(typed.pop("output_dir"))
        new = {"base_output_dir": str(path.parent), "experiment_name": path.name}
        warnings.append(
            f"--output_dir is an old name; use --base_output_dir {path.parent} --experiment_name {path.name}"
        )
    if "stage1_max_seq_len" in typed:
        new["max_seq_length"] = typed.pop("stage1_max_seq_len")
        warnings.append("--stage1_max_seq_len is an old name; use --max_seq_length")
    for name, value in new.items():
        if typed.get(name, value) != value:
            old = "--stage1_max_seq_len" if name == "max_seq_length" else "--output_dir"
            problems.append(f"{old} means --{name} {value}, but --{name} is {typed[name]}; leave {old} out")
    return new


def _merge(layers: list[tuple[str, dict[str, Any]]], problems: list[str]) -> tuple[dict, dict]:
    """Values and their sources, merged in order of rising precedence.

    Some options exclude each other: steps and epochs, the two lengths of the warm-up, the two ways to name GPUs. One
    of them in a layer replaces the other one in the layers below. ``--gpu_type manual`` replaces nothing.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        if layer.get("max_steps") is not None and layer.get("num_train_epochs") is not None:
            problems.append(f"max_steps and num_train_epochs are both given ({source}); give one")
        for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
            if layer.get(name) is not None:
                values[other] = None
        for name, other in (("warmup_steps", "warmup_ratio"), ("warmup_ratio", "warmup_steps")):
            if layer.get(name) and not layer.get(other):
                values[other] = 0
        for name, other in (("gpu_type", "gpu_ids"), ("gpu_ids", "gpu_type")):
            if layer.get(name) not in (None, "manual"):
                values[other] = None
        values |= layer
        sources |= dict.fromkeys(layer, source)
    return values, sources


def impossible_combinations(options: Options, sources: dict[str, str]) -> list[str]:
    """An error for each combination of options that cannot work."""
    problems = [*_name_problems(options.experiment_name), *_data_problems(options, sources)]
    if options.prepare_only and options.dry_run:
        problems.append("--prepare_only and --dry_run are both given; give one")
    if options.warmup_steps and options.warmup_ratio:
        problems.append("--warmup_steps and --warmup_ratio are both given; give one")
    if options.max_steps is None and options.num_train_epochs is None:
        problems.append("nothing to train: neither --max_steps nor --num_train_epochs is set")
    if options.gpu_ids is not None and options.gpu_type not in (None, "manual"):
        problems.append("--gpu_ids and --gpu_type are both given; give one")
    if options.gpu_type == "manual" and options.gpu_ids is None:
        problems.append('GPU "manual" needs the GPU numbers: --gpu_ids 0 1 2 3')
    if options.early_stopping_patience and options.eval_steps is None:
        problems.append("--early_stopping_patience needs evaluations; give --eval_steps")
    if not options.early_stopping_patience and sources.get("early_stopping_threshold") == COMMAND_LINE:
        problems.append(
            "--early_stopping_threshold has no effect without --early_stopping_patience; give both or none"
        )
    return problems


def _name_problems(name: str | None) -> list[str]:
    """Why ``--experiment_name`` cannot be the name of a directory inside ``--base_output_dir``."""
    problems = []
    if name is None:
        return problems
    if not Path(name.strip()).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        problems.append(f"--experiment_name {name!r} must stay inside --base_output_dir: no '..', no absolute path")
    if len(name.encode()) > 200:
        problems.append(f"--experiment_name is {len(name.encode())} bytes long; give at most 200")
    if any(ord(c) < 32 for c in name):
        problems.append(f"--experiment_name {name!r} contains a control character")
    return problems


def _data_problems(options: Options, sources: dict[str, str]) -> list[str]:
    """Options that ``--streaming`` excludes or needs."""
    problems = []
    if options.streaming and options.num_train_epochs is not None:
        problems.append("--num_train_epochs needs the number of rows, which --streaming never knows; give --max_steps")
    if options.streaming and options.prepare_only:
        problems.append("--prepare_only builds a token cache, but --streaming does not use one; give one of them")
    if not options.streaming and sources.get("streaming_buffer_rows") == COMMAND_LINE:
        problems.append("--streaming_buffer_rows has no effect without --streaming; give both or none")
    return problems

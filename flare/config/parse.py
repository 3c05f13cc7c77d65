"""From the command line, a JSON file and the environment to validated ``Options``. No torch.

Precedence: command line > ``--config`` file > environment > built-in defaults. All mistakes are collected
and reported at once, each with the name that the user typed, the value and the nearest known name.
"""

import argparse
import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flare.argument_parser import OneLineParser
from flare.config.config_file import ConfigFile, read_config_file
from flare.config.options import FIELDS, GROUPS, STAGE_DEFAULTS, Options
from flare.config.validate import checked, other_tools_name
from flare.errors import ConfigError, join_errors, nearest, one_line

REPO = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = REPO / "training_config.json"

EXAMPLES = """examples:
  python train_qwen_multi_gpu.py --stage 1 --gpu_type A800 --experiment_name x
  python train_qwen_multi_gpu.py --stage 2 --gpu_ids 0 1 4 5 --experiment_name x
  python train_qwen_multi_gpu.py --stage 1 --gpu_type cpu --nproc_per_node 2 \\
      --model_name_or_path ./tiny_qwen --dataset_name embedded \\
      --base_output_dir ./runs --max_seq_length 256 --max_steps 20
  python train_qwen_multi_gpu.py --model_name_or_path Qwen/Qwen2.5-7B --dry_run
"""

METAVARS = {
    "int": "N", "float": "X", "bool": "BOOL", "switch": "BOOL|selective|auto", "count": "N|auto", "ids": "ID",
    "layers": "LAYER", "weights": "W",
}  # fmt: skip

CLOCK = "clock"
"""Source of a default experiment name."""
SETTLED = ", settled"
"""Ends the source of a value that came of ``auto``, or of a default that depends on model or machine."""


@dataclass
class Resolved:
    """Options and where each value came from."""

    options: Options
    sources: dict[str, str]
    argv: list[str]
    warnings: list[str] = field(default_factory=list)

    def given(self, name: str) -> bool:
        """Whether the user set this option on the command line."""
        return self.sources.get(name) == "command line"

    @property
    def name_is_default(self) -> bool:
        """Whether the experiment's name is the time at which this process started, not the user's."""
        return self.sources.get("experiment_name") == CLOCK

    def with_name(self, name: str) -> "Resolved":
        """The same with this experiment name, on the command line too: workers must not look at the clock again."""
        argv = [*self.argv, "--experiment_name", name]
        sources = self.sources | {"experiment_name": "command line"}
        return Resolved(replace(self.options, experiment_name=name), sources, argv, self.warnings)

    def settled(self, **values: Any) -> "Resolved":
        """The same with what was left open settled; the source of a value that changes by it says so."""
        changed = [name for name, value in values.items() if getattr(self.options, name) != value]
        sources = {name: f"{self.sources.get(name, 'default').removesuffix(SETTLED)}{SETTLED}" for name in changed}
        return replace(self, options=replace(self.options, **values), sources=self.sources | sources)

    def given_for_stage(self, name: str) -> bool:
        """Whether the user set this option for this very stage: command line or the file's stage block."""
        return self.given(name) or ": stages." in self.sources.get(name, "")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``train_qwen_multi_gpu.py``, made from the option fields."""
    parser = OneLineParser(
        "train_qwen_multi_gpu.py",
        "[--stage N] [--gpu_type NAME | --gpu_ids ID ...]",
        "Staged continued pretraining of Qwen models with NoPE layers.",
        EXAMPLES,
        argument_default=argparse.SUPPRESS,
    )
    # argparse of Python < 3.14 takes -1e-5 for a flag; as a value it gets a useful error instead.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument(
        "--config",
        metavar="FILE[#NAME]",
        help="JSON file, // comments allowed (training_config.json); #NAME: one of the file's named configurations",
    )
    for name, spec in FIELDS.items():
        rules = spec.metadata
        text = rules["help"] + _default_text(spec)
        shape: dict[str, Any] = {"metavar": _metavar(rules)}
        if rules.get("kind") in ("bool", "switch"):
            shape |= {"nargs": "?", "const": "true"}
        elif rules.get("many"):
            shape |= {"nargs": "*"}
        groups[rules["group"]].add_argument(f"--{name}", help=text.replace("%", "%%"), **shape)
    old = parser.add_argument_group("old names (of train_qwen-stage.py)")
    old.add_argument("--output_dir", metavar="DIR", help="= --base_output_dir and --experiment_name")
    old.add_argument("--stage1_max_seq_len", metavar="N", help="= --max_seq_length")
    return parser


def _metavar(rules: Any) -> str:
    if "choices" in rules:
        return "{" + ",".join(str(c) for c in rules["choices"]) + "}"
    return METAVARS.get(rules.get("kind"), "TEXT")


def _default_text(spec: Any) -> str:
    default = spec.default_factory() if callable(spec.default_factory) else spec.default
    if default is None or default is False or "default" in spec.metadata["help"]:
        return ""
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    return f" [{shown}]"


def resolve(argv: list[str]) -> Resolved:
    """Options of a command line.

    Raises: ConfigError with every problem found.
    """
    problems: list[str] = []
    warnings: list[str] = []
    given, unknown = build_parser().parse_known_args(argv)
    typed = vars(given)
    problems += _unknown_arguments(unknown)
    typed |= _old_names(typed, warnings, problems)
    config = typed.pop("config", None)
    command_line = checked(typed, lambda n: f"--{n}", problems)
    stage = command_line.get("stage")
    if config is None and not DEFAULT_CONFIG.exists():
        file = ConfigFile(DEFAULT_CONFIG.name)
    else:
        file = read_config_file(config or str(DEFAULT_CONFIG), problems)
    stage = stage or file.values.get("stage") or 1
    environment = {}
    if os.environ.get("FLARE_OUTPUT_DIR"):
        environment["base_output_dir"] = os.environ["FLARE_OUTPUT_DIR"]
    layers = [
        ("default", STAGE_DEFAULTS.get(stage, {})),
        ("environment", environment),
        (file.name, file.values),
        (f"{file.name}: stages.{stage}", file.by_stage.get(str(stage), {})),
        ("command line", command_line),
    ]
    values, sources = _merge(layers, problems)
    options = Options(**values)
    problems += _impossible(options, sources)
    if problems:
        raise ConfigError(join_errors(problems))
    if "gradient_accumulation_steps" in command_line and options.global_batch_size is not None:
        warnings.append(
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps} has no effect: --global_batch_size "
            f"{options.global_batch_size} says how many rows a step has, and accumulates as they need"
        )
    if options.experiment_name is None:
        options.experiment_name = f"stage{options.stage}_{time.strftime('%Y%m%d_%H%M%S')}"
        sources["experiment_name"] = CLOCK
    return Resolved(options, sources, list(argv), warnings)


def _unknown_arguments(words: list[str]) -> list[str]:
    """A line for each unknown flag; the values behind it are no second mistake."""
    flags = [word for word in words if word.startswith("-")] or words
    return [f"unknown argument {one_line(word)}{_meant(word.split('=')[0])}" for word in flags]


def _meant(flag: str) -> str:
    """What to type for an unknown flag: ours for one of other tools, else the nearest name."""
    name = flag.removeprefix("--")
    return other_tools_name(name, "--") or nearest(flag, [f"--{known}" for known in [*FIELDS, "config"]])


def _old_names(typed: dict[str, Any], warnings: list[str], problems: list[str]) -> dict[str, Any]:
    """What old names stand for; a new name beside one that says another thing is a problem."""
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
            problems.append(f"{old} means --{name} {value}, and --{name} {typed[name]} is given; leave {old} out")
    return new


def _merge(layers: list[tuple[str, dict[str, Any]]], problems: list[str]) -> tuple[dict, dict]:
    """Values by rising precedence. Steps and epochs replace each other, and so do the two ways to give the warm-up and
    the two to name GPUs: the higher rank wins. ``manual`` names none."""
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


def _impossible(options: Options, sources: dict[str, str]) -> list[str]:
    """Combinations that cannot be, each as a line."""
    problems = []
    name = options.experiment_name
    if name is not None and (not Path(name.strip()).parts or Path(name).is_absolute() or ".." in Path(name).parts):
        problems.append(f"--experiment_name {name!r} must stay inside --base_output_dir: no '..', no absolute path")
    if name is not None and len(name.encode()) > 200:
        problems.append(f"--experiment_name is {len(name.encode())} bytes long; give at most 200")
    if name is not None and any(ord(c) < 32 for c in name):
        problems.append(f"--experiment_name {name!r} holds a control character")
    if options.prepare_only and options.dry_run:
        problems.append("--prepare_only and --dry_run are both given; give one")
    if options.warmup_steps and options.warmup_ratio:
        problems.append("--warmup_steps and --warmup_ratio are both given; give one")
    if options.max_steps is None and options.num_train_epochs is None:
        problems.append("nothing to train: neither --max_steps nor --num_train_epochs is set")
    if options.streaming and options.num_train_epochs is not None:
        problems.append("--num_train_epochs needs the number of rows, which --streaming never knows; give --max_steps")
    if options.streaming and options.prepare_only:
        problems.append("--prepare_only makes a token cache, and --streaming uses none; give one")
    if not options.streaming and sources.get("streaming_buffer_rows") == "command line":
        problems.append("--streaming_buffer_rows is for --streaming; give both or none")
    if options.gpu_ids is not None and options.gpu_type not in (None, "manual"):
        problems.append("--gpu_ids and --gpu_type are both given; give one")
    if options.gpu_type == "manual" and options.gpu_ids is None:
        problems.append('GPU "manual" needs the GPU numbers: --gpu_ids 0 1 2 3')
    if options.early_stopping_patience and options.eval_steps is None:
        problems.append("--early_stopping_patience needs evaluations; give --eval_steps")
    if not options.early_stopping_patience and sources.get("early_stopping_threshold") == "command line":
        problems.append("--early_stopping_threshold is for --early_stopping_patience; give both or none")
    return problems

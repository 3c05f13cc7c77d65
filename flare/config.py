"""From the command line, a JSON file and the environment to validated ``Options``. No torch.

Precedence: command line > ``--config`` file > environment > built-in defaults. All mistakes are collected
and reported at once, each with the name that the user typed, the value and the nearest known name.
"""

import argparse
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare.errors import ConfigError, join_errors, nearest
from flare.gpus import parse_gpu_ids
from flare.jsonc import read_jsonc
from flare.nope.layers import parse_layers
from flare.options import FIELDS, GROUPS, SECTIONS, STAGE_DEFAULTS, Options

REPO = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = REPO / "training_config.json"
KIND_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a string"}

EXAMPLES = """examples:
  python train_qwen_multi_gpu.py --stage 1 --gpu_type A800 --experiment_name my_experiment
  python train_qwen_multi_gpu.py --stage 2 --gpu_ids 0 1 4 5 --experiment_name my_experiment
  python train_qwen_multi_gpu.py --stage 1 --gpu_type cpu --nproc_per_node 2 --model_name_or_path ./tiny_qwen \\
      --dataset_name embedded --base_output_dir ./runs --max_seq_length 256 --max_steps 20
  python train_qwen_multi_gpu.py --stage 1 --model_name_or_path Qwen/Qwen2.5-7B --dry_run
"""


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

    def given_for_stage(self, name: str) -> bool:
        """Whether the user set this option for this very stage: command line or the file's stage block."""
        return self.given(name) or ": stages." in self.sources.get(name, "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(message[0].lower() + message[1:] + "; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line of ``train_qwen_multi_gpu.py``, made from the option fields."""
    parser = _Parser(
        prog="train_qwen_multi_gpu.py",
        description="Staged continued pretraining of Qwen models with NoPE layers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    # argparse of Python < 3.14 takes -1e-5 for a flag; as a value it gets a useful error instead.
    parser._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    groups["run"].add_argument(
        "--config", metavar="FILE", help="JSON file, // comments allowed (training_config.json)"
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
    return {"int": "N", "float": "X", "bool": "BOOL", "switch": "BOOL|auto", "ids": "ID", "layers": "LAYER"}.get(
        rules.get("kind"), "TEXT"
    )


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
    typed |= _old_names(typed, warnings)
    config_path = Path(typed.pop("config")) if "config" in typed else DEFAULT_CONFIG
    command_line = _checked(typed, lambda n: f"--{n}", problems)
    stage = command_line.get("stage")
    file_values, file_stages = _read_file(config_path, problems)
    stage = stage or file_values.get("stage") or 1
    environment = {}
    if os.environ.get("FLARE_OUTPUT_DIR"):
        environment["base_output_dir"] = os.environ["FLARE_OUTPUT_DIR"]
    layers = [
        ("default", STAGE_DEFAULTS.get(stage, {})),
        ("environment", environment),
        (config_path.name, file_values),
        (f"{config_path.name}: stages.{stage}", file_stages.get(str(stage), {})),
        ("command line", command_line),
    ]
    values, sources = _merge(layers, problems)
    options = Options(**values)
    problems += _impossible(options, sources)
    if problems:
        raise ConfigError(join_errors(problems))
    if options.experiment_name is None:
        options.experiment_name = f"stage{options.stage}_{time.strftime('%Y%m%d_%H%M%S')}"
    return Resolved(options, sources, list(argv), warnings)


def _unknown_arguments(words: list[str]) -> list[str]:
    """A line for each unknown flag; the values behind it are no second mistake."""
    known = [f"--{name}" for name in [*FIELDS, "config"]]
    flags = [word for word in words if word.startswith("-")] or words
    return [f"unknown argument {word}{nearest(word.split('=')[0], known)}" for word in flags]


def _old_names(typed: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
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
    return {name: value for name, value in new.items() if name not in typed}


def _merge(layers: list[tuple[str, dict[str, Any]]], problems: list[str]) -> tuple[dict, dict]:
    """Values by rising precedence. Steps and epochs replace each other: the higher rank wins."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        if layer.get("max_steps") is not None and layer.get("num_train_epochs") is not None:
            problems.append(f"max_steps and num_train_epochs are both given ({source}); give one")
        for name, other in (("max_steps", "num_train_epochs"), ("num_train_epochs", "max_steps")):
            if layer.get(name) is not None:
                values[other] = None
        values |= layer
        sources |= dict.fromkeys(layer, source)
    return values, sources


def _read_file(path: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Checked values of a config file, and those of its ``stages`` blocks by stage."""
    if path == DEFAULT_CONFIG and not path.exists():
        return {}, {}
    try:
        content = read_jsonc(path)
    except ConfigError as error:
        problems.append(str(error))
        return {}, {}
    if not isinstance(content, dict):
        problems.append(f"{path.name} must hold an object {{...}}, got {type(content).__name__}")
        return {}, {}
    stages = content.pop("stages", {})
    values = _checked_block(content, path.name, problems)
    by_stage = {}
    for stage, block in stages.items() if isinstance(stages, dict) else ():
        if stage not in ("1", "2"):
            problems.append(f'unknown key "{stage}" in {path.name} under stages; stages are "1" and "2"')
        by_stage[stage] = _checked_block(block, f"{path.name}: stages.{stage}", problems)
    return values, by_stage


def _checked_block(block: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Flatten one object of the file: options may lie in their section or beside the sections."""
    if not isinstance(block, dict):
        problems.append(f"{where} must be an object {{...}}")
        return {}
    flat: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for key, value in block.items():
        inside = value.items() if key in SECTIONS and isinstance(value, dict) else [(key, value)]
        for name, item in inside:
            path = f"{key}.{name}" if key in SECTIONS else name
            if name not in FIELDS:
                problems.append(f'unknown key "{path}" in {where}{nearest(name, FIELDS)}')
            elif key in SECTIONS and FIELDS[name].metadata["section"] != key:
                section = FIELDS[name].metadata["section"]
                problems.append(f'"{path}" in {where}: {name} belongs under "{section}"')
            elif name in flat:
                problems.append(f'"{name}" is given twice in {where} ({paths[name]} and {path})')
            else:
                flat[name], paths[name] = item, path
    return _checked(flat, lambda n: f"{where}: {paths[n]}", problems)


def _checked(raw: dict[str, Any], label: Any, problems: list[str]) -> dict[str, Any]:
    """Values of the right type and within their bounds; each mistake becomes a line of ``problems``."""
    values = {}
    for name, value in raw.items():
        try:
            values[name] = check_value(name, value, from_text=label(name).startswith("--"))
        except ConfigError as error:
            problems.append(f"{label(name)} {error}")
    return values


def check_value(name: str, value: Any, from_text: bool = False) -> Any:
    """One option's value converted and checked against its field.

    Raises: ConfigError that begins where the option's name ends ("must be ..., got ...").
    """
    rules = FIELDS[name].metadata
    kind = rules.get("kind", "str")
    if value is None:
        return None
    if kind == "ids":
        return parse_gpu_ids(value)
    if kind == "layers":
        return _layer_words(value)
    if kind == "switch":
        kind = "str" if value == "auto" else "bool"
    if from_text and kind != "str":
        value = _from_text(value, kind)
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value).__name__ != kind:
        shown = f'the string "{value}"' if isinstance(value, str) else repr(value)
        raise ConfigError(f"must be {KIND_NAMES[kind]}, got {shown}")
    _check_bounds(value, rules)
    return value


def _layer_words(value: Any) -> list[str]:
    words = [str(word) for word in value] if isinstance(value, list) else str(value).split()
    if not words:
        raise ConfigError("needs at least one layer, or none")
    plain = [w for w in words if w not in ("nope", "nope_attention")]
    if plain:
        # Syntax only: the real depth is known when the model's configuration is read.
        parse_layers(plain, 10_000, "").copy()
    return words


def _from_text(value: str, kind: str) -> Any:
    """A typed value of a command-line word; the word itself when it is none, for the type error."""
    if kind == "bool":
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.lower(), value
        )
    try:
        return {"int": int, "float": float}[kind](value)
    except ValueError:
        return value


def _check_bounds(value: Any, rules: Any) -> None:
    if "choices" in rules and value not in rules["choices"]:
        choices = ", ".join(str(c) for c in rules["choices"])
        raise ConfigError(f"must be one of {choices}; got {value!r}{nearest(str(value), map(str, rules['choices']))}")
    if value != value:
        raise ConfigError("must be a number, got nan")
    for rule, wrong, words in (
        ("low", lambda v, b: v < b, ">="),
        ("above", lambda v, b: v <= b, ">"),
        ("high", lambda v, b: v > b, "<="),
        ("below", lambda v, b: v >= b, "<"),
    ):
        if rule in rules and wrong(value, rules[rule]):
            raise ConfigError(f"must be {words} {rules[rule]}, got {value}")


def _impossible(options: Options, sources: dict[str, str]) -> list[str]:
    """Combinations that cannot be, each as a line."""
    problems = []
    name = options.experiment_name
    if name is not None and (
        not name.strip() or name in (".", "..") or Path(name).is_absolute() or ".." in Path(name).parts
    ):
        problems.append(f"--experiment_name {name!r} must stay inside --base_output_dir: no '..', no absolute path")
    if name is not None and any(ord(c) < 32 for c in name):
        problems.append(f"--experiment_name {name!r} holds a control character")
    if options.warmup_steps and options.warmup_ratio:
        problems.append("--warmup_steps and --warmup_ratio are both given; give one")
    if options.max_steps is None and options.num_train_epochs is None:
        problems.append("nothing to train: neither --max_steps nor --num_train_epochs is set")
    if options.gpu_ids is not None and options.gpu_type not in (None, "manual"):
        if sources.get("gpu_ids") == sources.get("gpu_type"):
            problems.append("--gpu_ids and --gpu_type are both given; give one")
        elif sources.get("gpu_ids") == "command line":
            options.gpu_type = None
        else:
            options.gpu_ids = None
    if options.gpu_type == "manual" and options.gpu_ids is None:
        problems.append('GPU "manual" needs the card numbers: --gpu_ids 0 1 2 3')
    if options.early_stopping_patience and options.eval_steps is None:
        problems.append("--early_stopping_patience needs evaluations; give --eval_steps")
    return problems

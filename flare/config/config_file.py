"""A config file: one configuration, or several named ones from which ``--config FILE#NAME`` selects."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare.config.options import FIELDS, SECTIONS
from flare.config.validate import other_tools_name
from flare.errors import ConfigError, first_line, nearest, one_line
from flare.option_values import check_values


@dataclass
class ConfigFile:
    """The checked options of a config file."""

    name: str  # FILE or FILE#NAME without directories, for errors and sources
    values: dict[str, Any] = field(default_factory=dict)
    by_stage: dict[str, dict[str, Any]] = field(default_factory=dict)  # by key of "stages": "1", "2"


def read_config_file(typed: str, problems: list[str]) -> ConfigFile:
    """The configuration of ``--config FILE`` or ``--config FILE#NAME``; mistakes are appended to ``problems``."""
    path, wanted = split_name(typed)
    file = ConfigFile(path.name if wanted is None else f"{path.name}#{wanted}")
    try:
        content = choose_block(read_jsonc(path), typed, wanted)
    except ConfigError as error:
        problems.append(str(error))
        return file
    if not isinstance(content, dict):
        problems.append(f"{file.name} must contain an object {{...}}, got {type(content).__name__}")
        return file
    stages = content.pop("stages", {})
    file.values = check_block(content, file.name, problems)
    if not isinstance(stages, dict):
        problems.append(f'stages in {file.name} must be an object {{"1": {{...}}, "2": {{...}}}}')
        return file
    for stage, block in stages.items():
        if stage not in ("1", "2"):
            problems.append(f'unknown key "{one_line(stage)}" in {file.name} under stages; stages are "1" and "2"')
            continue
        file.by_stage[stage] = check_block(block, f"{file.name}: stages.{stage}", problems)
        if "stage" in file.by_stage[stage]:
            problems.append(f"stage in {file.name}: stages.{stage} repeats it; leave it out there")
    return file


def split_name(typed: str) -> tuple[Path, str | None]:
    """(path, name of the configuration or None) of ``FILE#NAME``. A file that exists under the full name has none."""
    path, separator, name = typed.rpartition("#")
    if not separator or path_exists(Path(typed)):
        return Path(typed), None
    return Path(path), name


def choose_block(content: Any, typed: str, wanted: str | None) -> Any:
    """The configuration with the name ``wanted``, or the complete file for None.

    Raises: ConfigError that lists the names when the file has several configurations and ``wanted`` is none of them.
    """
    blocks = content if isinstance(content, dict) and _has_named_blocks(content) else {}
    names = ", ".join(map(one_line, blocks))
    path = typed if wanted is None else typed.removesuffix(f"#{wanted}")
    if wanted is None:
        if blocks:
            raise ConfigError(f"--config {typed} contains several configurations; choose one with #NAME: {names}")
        return content
    if not blocks:
        raise ConfigError(f"--config {typed}: {path} contains one configuration without a name; leave #{wanted} out")
    if wanted not in blocks:
        what = f"has no {wanted!r}{nearest(wanted, blocks)}" if wanted else "needs a name"
        raise ConfigError(f"--config {path}#NAME {what}; names: {names}")
    return blocks[wanted]


def _has_named_blocks(content: dict[str, Any]) -> bool:
    """Whether all keys are names of configurations: all values are objects, and no key is an option or a section."""
    known = {*FIELDS, *SECTIONS, "stages"}
    return bool(content) and all(isinstance(v, dict) and k not in known for k, v in content.items())


def check_block(block: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Checked options of one object of the file. An option may be in its section or at the top level."""
    if not isinstance(block, dict):
        problems.append(f"{where} must be an object {{...}}")
        return {}
    flat: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for key, value in block.items():
        if key in SECTIONS and not isinstance(value, dict):
            problems.append(f'"{key}" in {where} must be an object {{...}}')
            continue
        inside = value.items() if key in SECTIONS else [(key, value)]
        for name, item in inside:
            path = f"{key}.{name}" if key in SECTIONS else name
            if name not in FIELDS:
                meant = other_tools_name(name) or nearest(name, FIELDS)
                problems.append(f'unknown key "{one_line(path)}" in {where}{meant}')
            elif key in SECTIONS and FIELDS[name].section != key:
                section = FIELDS[name].section
                problems.append(f'"{path}" in {where}: {name} belongs under "{section}"')
            elif name in flat:
                problems.append(f'"{name}" is given twice in {where} ({paths[name]} and {path})')
            else:
                flat[name], paths[name] = item, path
    return check_values(FIELDS, flat, lambda n: f"{where}: {paths[n]}", problems)


COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


def read_jsonc(path: Path) -> Any:
    """The value in ``path``. Comments are replaced by spaces, so that positions in errors stay right.

    Raises: ConfigError for a file that is missing, a directory, empty, not UTF-8 or not JSON.
    """
    shown = one_line(str(path))
    if not path_exists(path):
        raise ConfigError(f"config not found: {shown} (looked in {Path.cwd()})")
    if path.is_dir():
        raise ConfigError(f"config is a directory: {shown}; give a .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}") from error
    if not text.strip():
        raise ConfigError(f"{shown} is empty; write at least {{}}")
    return parse_jsonc(text, path.name)


def path_exists(path: Path) -> bool:
    """Whether the file or directory exists; False for an impossible name, too."""
    try:
        return path.exists()
    except OSError:  # the name is too long
        return False


def parse_jsonc(text: str, name: str) -> Any:
    """The value of ``text``; errors begin with ``name``."""
    plain = COMMENT_OR_STRING.sub(lambda m: m[0] if m[0][0] == '"' else " " * len(m[0]), text)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict:
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                lines = [str(i) for i, line in enumerate(plain.splitlines(), 1) if f'"{key}"' in line]
                where = f" (line{'s' * (len(lines) > 1)} {' and '.join(lines)})" if lines else ""
                raise ConfigError(f'{name}: key "{one_line(key)}" appears twice{where}')
        return dict(pairs)

    def no_constant(word: str) -> None:
        raise ConfigError(f"{name}: {word} is not JSON; give a number")

    try:
        return json.loads(plain, object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} line {error.lineno} column {error.colno}: {_reason(plain, error)}") from error
    except (ValueError, RecursionError) as error:  # too large a number, or nested too deeply
        raise ConfigError(f"{name} cannot be read: {first_line(error)}") from error


def _reason(text: str, error: json.JSONDecodeError) -> str:
    before = text[: error.pos].rstrip()
    comma_last = before.endswith(",") or text[error.pos : error.pos + 1] == ","
    closes = re.match(r"[,\s]*[}\]]", text[error.pos :])
    return "trailing comma is not JSON" if comma_last and closes else error.msg

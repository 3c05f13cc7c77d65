"""A config file: one configuration, or named ones that ``--config FILE#NAME`` chooses from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flare.errors import ConfigError, nearest, one_line
from flare.jsonc import is_there, read_jsonc
from flare.option_values import checked, other_tools_name
from flare.options import FIELDS, SECTIONS


@dataclass
class ConfigFile:
    """What a config file says, checked."""

    name: str  # as errors and sources call it: FILE or FILE#NAME, without directories
    values: dict[str, Any] = field(default_factory=dict)
    by_stage: dict[str, dict[str, Any]] = field(default_factory=dict)  # of its "stages" blocks: "1", "2"


def read_config_file(typed: str, problems: list[str]) -> ConfigFile:
    """The configuration that ``--config FILE`` or ``--config FILE#NAME`` names; mistakes go to ``problems``."""
    path, wanted = split_name(typed)
    file = ConfigFile(path.name if wanted is None else f"{path.name}#{wanted}")
    try:
        content = choose_block(read_jsonc(path), typed, wanted)
    except ConfigError as error:
        problems.append(str(error))
        return file
    if not isinstance(content, dict):
        problems.append(f"{file.name} must hold an object {{...}}, got {type(content).__name__}")
        return file
    stages = content.pop("stages", {})
    file.values = checked_block(content, file.name, problems)
    if not isinstance(stages, dict):
        problems.append(f'stages in {file.name} must be an object {{"1": {{...}}, "2": {{...}}}}')
        return file
    for stage, block in stages.items():
        if stage not in ("1", "2"):
            problems.append(f'unknown key "{one_line(stage)}" in {file.name} under stages; stages are "1" and "2"')
            continue
        file.by_stage[stage] = checked_block(block, f"{file.name}: stages.{stage}", problems)
        if "stage" in file.by_stage[stage]:
            problems.append(f"stage in {file.name}: stages.{stage} says it again; leave it out there")
    return file


def split_name(typed: str) -> tuple[Path, str | None]:
    """(path, block's name or None) of ``FILE#NAME``; a file whose own name holds a # is taken as it is."""
    path, separator, name = typed.rpartition("#")
    if not separator or is_there(Path(typed)):
        return Path(typed), None
    return Path(path), name


def choose_block(content: Any, typed: str, wanted: str | None) -> Any:
    """The block of this name, or the whole file when none is wanted.

    Raises: ConfigError that lists the names when a file of blocks is not asked for one that it has.
    """
    blocks = content if isinstance(content, dict) and _holds_blocks(content) else {}
    names = ", ".join(map(one_line, blocks))
    path = typed if wanted is None else typed.removesuffix(f"#{wanted}")
    if wanted is None:
        if blocks:
            raise ConfigError(f"--config {typed} holds several configurations; choose one with #NAME: {names}")
        return content
    if not blocks:
        raise ConfigError(f"--config {typed}: {path} holds one configuration without a name; leave #{wanted} out")
    if wanted not in blocks:
        what = f"has no {wanted!r}{nearest(wanted, blocks)}" if wanted else "needs a name"
        raise ConfigError(f"--config {path}#NAME {what}; names: {names}")
    return blocks[wanted]


def _holds_blocks(content: dict[str, Any]) -> bool:
    """Whether all keys are names of configurations: none is an option or a section, all hold objects."""
    known = {*FIELDS, *SECTIONS, "stages"}
    return bool(content) and all(isinstance(v, dict) and k not in known for k, v in content.items())


def checked_block(block: Any, where: str, problems: list[str]) -> dict[str, Any]:
    """Flatten one object of the file: options may lie in their section or beside the sections."""
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
            elif key in SECTIONS and FIELDS[name].metadata["section"] != key:
                section = FIELDS[name].metadata["section"]
                problems.append(f'"{path}" in {where}: {name} belongs under "{section}"')
            elif name in flat:
                problems.append(f'"{name}" is given twice in {where} ({paths[name]} and {path})')
            else:
                flat[name], paths[name] = item, path
    return checked(flat, lambda n: f"{where}: {paths[n]}", problems)

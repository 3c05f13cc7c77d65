"""JSON with ``//`` comments, read strictly: no repeated key, no NaN, and errors with line and column."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from flare.errors import ConfigError, first_line, one_line

COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*')


def read_jsonc(path: Path) -> Any:
    """The value in ``path``. Comments are blanked, not cut, so that positions in errors stay true.

    Raises: ConfigError for a file that is missing, a directory, empty, not UTF-8 or not JSON.
    """
    shown = one_line(str(path))
    if not is_there(path):
        raise ConfigError(f"config not found: {shown} (looked in {Path.cwd()})")
    if path.is_dir():
        raise ConfigError(f"config is a directory: {shown}; give a .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is no mistake of the user
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise ConfigError(f"cannot read {shown}: {error.strerror}") from error
    if not text.strip():
        raise ConfigError(f"{shown} is empty; write at least {{}}")
    return parse_jsonc(text, path.name)


def is_there(path: Path) -> bool:
    """Whether there is a file or directory of this name, which may be no possible one."""
    try:
        return path.exists()
    except OSError:  # far too long
        return False


def parse_jsonc(text: str, name: str) -> Any:
    """The value of ``text``; ``name`` is what errors call it."""
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
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond all measure
        raise ConfigError(f"{name} cannot be read: {first_line(error)}") from error


def _reason(text: str, error: json.JSONDecodeError) -> str:
    before = text[: error.pos].rstrip()
    comma_last = before.endswith(",") or text[error.pos : error.pos + 1] == ","
    closes = re.match(r"[,\s]*[}\]]", text[error.pos :])
    return "trailing comma is not JSON" if comma_last and closes else error.msg

"""Atomic writes of text files: readers see the old content or the new, never a part; and the path of this repository.

Standard library only.
"""

import json
import os
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
"""The directory of the scripts; it contains the package."""


def file_mode() -> int:
    """Permissions of a new file under the umask of this process."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text to a temporary file next to ``path``, sync it, and rename it to ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, file_mode())  # mkstemp gives 0600, which the user's group cannot read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path | str, content: object) -> None:
    """Write indented JSON atomically. Raises: ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_name(name: str) -> str:
    """``name`` with all characters replaced that could be a problem in a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in Path(name).name)

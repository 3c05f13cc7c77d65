"""Files that are whole or absent: readers see the old content or the new, never half. Standard library only."""

import json
import os
import tempfile
from pathlib import Path


def file_mode() -> int:
    """Permissions that a new file gets under this process's umask."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text to a temporary file beside ``path``, sync it, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, file_mode())  # mkstemp's 0600 would hide the file from the user's group
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path | str, content: object) -> None:
    """``write_text`` of indented JSON. Raises: ValueError for NaN and infinity, which are no JSON."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def file_name(name: str) -> str:
    """A name as (part of) a file's name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in Path(name).name)

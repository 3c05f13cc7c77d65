"""Finished parts of an evaluation on disk, so that an interrupted evaluation can resume.

A part is identified by everything that its numbers depend on, but not by batch size and number of processes.
"""

import hashlib
import json
import shutil
from pathlib import Path

from flare.files import file_name, write_json

DIRECTORY = "unfinished"


class FinishedParts:
    """The parts under ``unfinished/`` of an output directory; ``clear`` when the report is written."""

    def __init__(self, output_dir: Path) -> None:
        self.directory = output_dir / DIRECTORY

    def read(self, name: str, identity: dict) -> dict | None:
        """The part that was written for this identity, or None."""
        try:
            return json.loads(self._path(name, identity).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write(self, name: str, identity: dict, part: dict) -> None:
        """Write a finished part atomically."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name, identity), part)

    def clear(self) -> None:
        """Delete all parts."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str, identity: dict) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.directory / f"{file_name(name)}-{digest}.json"


def model_identity(directory: Path) -> dict[str, list]:
    """The files of a model directory: name -> size and time of the last change."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def texts_identity(texts: list[str]) -> str:
    """A hash of documents and their order."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()

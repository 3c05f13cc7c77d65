"""Where documents come from: hub data sets, local files and folders, the embedded corpus.

A source yields rows as they are, with the place they came from; what is usable text is decided in
``flare.data.tokens``. Nothing here tokenises.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flare.data.embedded import embedded_documents
from flare.data.file_formats import KINDS
from flare.data.files import FileSource, find_files
from flare.data.hub_sets import HubSource
from flare.data.rows import Piece, Row, Source, SourceSpec
from flare.errors import ConfigError


def open_source(spec: SourceSpec, token_dir: Path) -> Source:
    """The source that ``--dataset_name`` names.

    Raises: ConfigError for a path that is not there, DataError / EnvError for a hub set that cannot be had.
    """
    name = spec.dataset_name
    if name == "embedded":
        return EmbeddedSource(token_dir)
    path = Path(name)
    if path.exists():
        return FileSource(find_files(path), spec.text_column)
    looks_local = path.suffix in KINDS or path.is_absolute() or name.startswith((".", "~"))
    if looks_local or name.count("/") > 1:
        raise ConfigError(f"--dataset_name {name}: no such file or directory (looked in {Path.cwd()})")
    return HubSource(spec)


@dataclass(frozen=True)
class Documents(Piece):
    """Documents in memory, as (name, text)."""

    documents: tuple[tuple[str, str], ...]

    def rows(self) -> Iterator[Row]:
        for name, text in self.documents:
            yield Row(text, f"embedded:{name}")


class EmbeddedSource(Source):
    """English prose and docstrings that come with every Python (contract, section 1)."""

    def __init__(self, cache: Path) -> None:
        self.documents = embedded_documents(cache)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, text in self.documents:
            digest.update(f"{name}\0{text}\0".encode())
        return f"embedded:{digest.hexdigest()}"

    def pieces(self) -> list[Piece]:
        return [Documents(tuple(self.documents))]

"""Where documents come from: hub data sets, local files, folders and saved sets, the embedded corpus.

A source yields rows as they are, with the place they came from; what is usable text is decided in
``flare.data.sources.documents``. Nothing here tokenises.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flare.data.sources.base import Piece, Row, Source, SourceSpec
from flare.data.sources.embedded import embedded_documents
from flare.data.sources.file_formats import kind_of
from flare.data.sources.files import FileSource, find_files, glob_root, is_glob, match_files
from flare.data.sources.hub import HubSource
from flare.data.sources.hub_snapshots import cached_snapshot, is_snapshot, snapshot_files
from flare.data.sources.saved import SavedSource, is_saved
from flare.errors import ConfigError, EnvError
from flare.logs import log


def open_source(spec: SourceSpec, token_dir: Path) -> Source:
    """The source that ``spec.dataset_name`` names: ``embedded``, what lies at that path, a glob, or a hub set.

    Raises: ConfigError for a path that is not there, DataError / EnvError for a hub set that cannot be had.
    """
    name = spec.dataset_name
    if name == "embedded":
        warn_of_parts(spec)
        return EmbeddedSource(token_dir)
    if path := path_of(name):
        return open_path(path, spec, token_dir)
    if is_glob(name):
        warn_of_parts(spec)
        pattern = str(Path(name).expanduser())
        root = glob_root(pattern)
        files = match_files(pattern, spec.asked, cache_below(root, token_dir))
        return FileSource(files, spec.text_column, root, token_dir)
    if is_missing_path(name):
        raise ConfigError(f"{spec.asked}: no such file or directory (looked in {Path.cwd()})")
    return open_hub_set(spec, token_dir)


def is_missing_path(name: str) -> bool:
    """Whether a data set's name can only be a path, of one file or folder, and nothing is there."""
    path = Path(name).expanduser()
    looks_local = kind_of(path) is not None or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return looks_local and path_of(name) is None and not is_glob(name)


def path_of(name: str) -> Path | None:
    """The file or folder of that name, if there is one."""
    path = Path(name).expanduser()
    try:
        return path if path.exists() else None
    except OSError:  # a name too long for a path
        return None


def open_path(path: Path, spec: SourceSpec, token_dir: Path) -> Source:
    """A file, a folder of files, what ``save_to_disk`` wrote, or a folder laid out as on the hub.

    Only the last one has configurations, and the last two have splits: elsewhere these options are warned of.

    Raises: ConfigError when the cache directory is the folder of files itself.
    """
    if is_saved(path):
        return SavedSource(path, spec, token_dir)
    if is_snapshot(path):
        return FileSource(snapshot_files(path, spec), spec.text_column, path, token_dir)
    if path.resolve() == token_dir.resolve():  # what is cached there would be data at the next start
        raise ConfigError(
            f"--cache_dir {token_dir} is the folder of the data itself; give another, in it or elsewhere"
        )
    warn_of_parts(spec)
    files = find_files(path, spec.asked, cache_below(path, token_dir))
    return FileSource(files, spec.text_column, path, token_dir)


def warn_of_parts(spec: SourceSpec) -> None:
    """Say that one was asked of data without any. Where several sets are mixed, another may have it."""
    asked = {"config": spec.dataset_config, "revision": spec.dataset_revision}
    asked |= {"split": spec.dataset_split if spec.dataset_split != SourceSpec.dataset_split else None}
    for name, value in asked.items():
        if value:
            log.warning(f"--dataset_{name} {value} means nothing for {spec.dataset_name}: all of it is read")


def cache_below(folder: Path, token_dir: Path) -> Path | None:
    """The cache directory if it lies in a folder of data: what is in it is no data."""
    return token_dir if folder.resolve() in token_dir.resolve().parents else None


def open_hub_set(spec: SourceSpec, token_dir: Path) -> Source:
    """A set of the hub; when the hub cannot be reached, its snapshot in the hub's cache (``hf download``)."""
    try:
        return HubSource(spec)
    except EnvError:
        snapshot = cached_snapshot(spec)
        if snapshot is None:
            raise
    log.warning(f"data set {spec.dataset_name} cannot be loaded from the hub; read from its snapshot {snapshot}")
    return FileSource(snapshot_files(snapshot, spec), spec.text_column, snapshot, token_dir)


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

    def describe(self) -> dict[str, str]:
        return {"embedded corpus": f"{len(self.documents)} documents of Python {platform.python_version()}"}

    def pieces(self) -> list[Piece]:
        return [Documents(tuple(self.documents))]

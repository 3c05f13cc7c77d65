"""Opens the source that ``--dataset_name`` names: a hub data set, local files, a saved data set, the embedded corpus.

A source yields unchecked rows and where each was read. ``flare.data.sources.documents`` checks them.
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
    """Open the source that ``spec.dataset_name`` names: ``embedded``, an existing path, a glob, or a hub data set.

    Raises: ConfigError when a path does not exist; DataError or EnvError when a hub data set cannot be loaded.
    """
    name = spec.dataset_name
    if name == "embedded":
        warn_of_unused_options(spec)
        return EmbeddedSource(token_dir)
    if path := path_of(name):
        return open_path(path, spec, token_dir)
    if is_glob(name):
        warn_of_unused_options(spec)
        pattern = str(Path(name).expanduser())
        root = glob_root(pattern)
        files = match_files(pattern, spec.flag_and_value, cache_dir_inside(root, token_dir))
        return FileSource(files, spec.text_column, root, token_dir)
    if is_missing_path(name):
        raise ConfigError(f"{spec.flag_and_value}: no such file or directory (looked in {Path.cwd()})")
    return open_hub_set(spec, token_dir)


def is_missing_path(name: str) -> bool:
    """Whether a name can only be a path (not a glob or a hub data set), and this path does not exist."""
    path = Path(name).expanduser()
    looks_local = kind_of(path) is not None or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return looks_local and path_of(name) is None and not is_glob(name)


def path_of(name: str) -> Path | None:
    """The path of an existing file or folder, else None."""
    path = Path(name).expanduser()
    try:
        return path if path.exists() else None
    except OSError:  # a name too long for a path
        return None


def open_path(path: Path, spec: SourceSpec, token_dir: Path) -> Source:
    """Open a file, a folder of files, a data set that ``save_to_disk`` wrote, or a hub snapshot.

    Only snapshots have configurations; only snapshots and saved data sets have splits.

    Raises: ConfigError when ``token_dir`` is the data folder itself.
    """
    if is_saved(path):
        return SavedSource(path, spec, token_dir)
    if is_snapshot(path):
        return FileSource(snapshot_files(path, spec), spec.text_column, path, token_dir)
    if path.resolve() == token_dir.resolve():  # the next start would read cached files as data
        raise ConfigError(
            f"--cache_dir {token_dir} is the data folder itself; give another directory, inside or outside it"
        )
    warn_of_unused_options(spec)
    files = find_files(path, spec.flag_and_value, cache_dir_inside(path, token_dir))
    return FileSource(files, spec.text_column, path, token_dir)


def warn_of_unused_options(spec: SourceSpec) -> None:
    """Warn of a config, revision or split for data that has none. It is not an error: in a mixture, another data
    set may have it."""
    options = {"config": spec.dataset_config, "revision": spec.dataset_revision}
    options |= {"split": spec.dataset_split if spec.dataset_split != SourceSpec.dataset_split else None}
    for name, value in options.items():
        if value:
            log.warning(f"--dataset_{name} {value} has no effect on {spec.dataset_name}: all its rows are read")


def cache_dir_inside(folder: Path, token_dir: Path) -> Path | None:
    """The cache directory if it is inside a data folder, else None. Its files must not be read as data."""
    return token_dir if folder.resolve() in token_dir.resolve().parents else None


def open_hub_set(spec: SourceSpec, token_dir: Path) -> Source:
    """Open a hub data set. If the hub cannot be reached, read the snapshot in the hub's cache (``hf download``)."""
    try:
        return HubSource(spec)
    except EnvError:
        snapshot = cached_snapshot(spec)
        if snapshot is None:
            raise
    log.warning(f"data set {spec.dataset_name} cannot be loaded from the hub; reads its cached snapshot {snapshot}")
    return FileSource(snapshot_files(snapshot, spec), spec.text_column, snapshot, token_dir)


@dataclass(frozen=True)
class Documents(Piece):
    """Documents in memory, as (name, text) pairs."""

    documents: tuple[tuple[str, str], ...]

    def rows(self) -> Iterator[Row]:
        for name, text in self.documents:
            yield Row(text, f"embedded:{name}")


class EmbeddedSource(Source):
    """The embedded corpus: English prose and docstrings that are part of every Python installation."""

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

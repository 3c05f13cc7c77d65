"""Reads data sets of the Hugging Face hub with ``datasets``."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flare.data.sources.base import Piece, Row, Source, SourceSpec, missing_column
from flare.data.sources.hub_snapshots import is_about_script
from flare.data.sources.saved import table_slices
from flare.errors import ConfigError, DataError, EnvError, FlareError, first_line
from flare.hub import cached_data_sets, disk_error
from flare.logs import log

PARQUET_COPY = "refs/convert/parquet"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Shard(Piece):
    """A shard of a streamed ``datasets.IterableDataset``, usually one file of the hub."""

    dataset: Any
    column: str
    name: str
    index: int
    count: int

    def rows(self) -> Iterator[Row]:
        shard = self.dataset.shard(self.count, self.index)
        name = self.name if self.count == 1 else f"{self.name} shard {self.index}"
        number = 0
        try:
            for record in shard:
                if self.column not in record:  # a streamed data set may not know its columns earlier
                    raise missing_column(self.column, self.name, list(record))
                yield Row(record[self.column], f"{name}[{number}]")
                number += 1
        except FlareError:
            raise
        except Exception as error:  # ``datasets`` and the hub's client raise many types
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise DataError(f"{name} cannot be read after its first {number} rows ({reason})") from error


class HubSource(Source):
    """One split of a hub data set."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.dataset = _load_hub_dataset(spec)
        names = self.dataset.column_names or [spec.text_column]  # a streamed set may not know them yet
        if spec.text_column not in names:
            raise missing_column(spec.text_column, spec.dataset_name, names)

    def fingerprint(self) -> str:
        spec = self.spec
        parts = (spec.dataset_name, spec.dataset_config, spec.dataset_split, spec.text_column)
        return ":".join(map(str, ("hub", *parts, self.dataset._fingerprint)))

    def describe(self) -> dict[str, str]:
        spec = self.spec
        return {
            "dataset_config": str(spec.dataset_config),
            "dataset_split": spec.dataset_split,
            "text_column": spec.text_column,
            "content": f"{commit_of(self.dataset) or 'unknown revision'}, fingerprint {self.dataset._fingerprint}",
        }

    def pieces(self) -> list[Piece]:
        column, name = self.spec.text_column, self.spec.dataset_name
        if not self.spec.streaming:
            return table_slices(self.dataset, column, name)
        dataset = self.dataset.select_columns([column])
        count = dataset.num_shards
        return [Shard(dataset, column, name, index, count) for index in range(count)]


def _load_hub_dataset(spec: SourceSpec) -> Any:
    """Load a data set. Raises: ConfigError, DataError or EnvError; each message says how to fix it."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    name = f"data set {spec.dataset_name!r}"
    try:
        commit = _resolve_commit(spec)
        dataset = _load_with_fallback(spec, commit)
        _check_commit(dataset, spec, commit)
        return dataset
    except DatasetNotFoundError as error:
        if "Revision" in str(error):  # an unknown commit; branches and tags were resolved before
            raise ConfigError(f"--dataset_revision {spec.dataset_revision}: {name} has no such revision") from error
        raise DataError(
            f"{name} is not a local file, and the hub has no such data set, or it is gated; check the name, set "
            f"HF_TOKEN for a gated data set, set HF_ENDPOINT to a mirror, or give local files{_cached(spec)}"
        ) from error
    except (DatasetsError, FileNotFoundError) as error:  # no data files, or damaged ones
        if disk := disk_error(name, error):
            raise disk from error
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{name} cannot be read: {reason}") from error
    except ValueError as error:  # unknown configuration or split: the message lists the known ones
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    except FlareError:
        raise
    except Exception as error:  # the hub's client raises many types without a network
        if disk := disk_error(name, error):
            raise disk from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise EnvError(
            f"{name} is not a local file and cannot be loaded from the hub ({reason}); "
            "set HF_ENDPOINT to a mirror, HF_HUB_OFFLINE=1 to use the cache, or give local files"
            f"{_cached(spec)}"
        ) from error


def _cached(spec: SourceSpec) -> str:
    return f"; cached data sets: {', '.join(cached_data_sets(spec.cache_dir)) or 'none'}"


def _load_with_fallback(spec: SourceSpec, commit: str | None) -> Any:
    """``datasets`` 4 and newer runs no loading scripts. For most of these data sets the hub has a parquet copy."""
    from datasets import load_dataset

    arguments = {
        "name": spec.dataset_config,
        "split": spec.dataset_split,
        "cache_dir": spec.cache_dir,
        "streaming": spec.streaming,
    }
    try:
        return load_dataset(spec.dataset_name, revision=commit, **arguments)
    except RuntimeError as error:
        if not is_about_script(error):
            raise
    name = spec.dataset_name
    if spec.dataset_revision:
        raise ConfigError(
            f"--dataset_revision {spec.dataset_revision}: data set {name!r} is a loading script there, which is not "
            f"run; leave out --dataset_revision to use the hub's parquet copy ({PARQUET_COPY})"
        )
    log.warning(f"data set {name} is a loading script, which is not run; uses the hub's parquet copy {PARQUET_COPY}")
    return load_dataset(name, revision=PARQUET_COPY, **arguments)


def commit_of(dataset: Any) -> str | None:
    """The hub commit of a loaded data set, if known: ``datasets`` names the directory of its Arrow files after it."""
    files = getattr(dataset, "cache_files", None) or [{"filename": ""}]
    name = Path(files[0]["filename"]).parent.name
    return name if COMMIT.fullmatch(name) else None


def _resolve_commit(spec: SourceSpec) -> str | None:
    """The commit of ``--dataset_revision``, from the hub or, without a network, from the hub's cache.

    Raises: ConfigError for an unknown revision; EnvError when neither the hub nor the cache knows it.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = spec.dataset_name, spec.dataset_revision
    if revision is None or COMMIT.fullmatch(revision):
        return revision
    try:  # this download also records the revision's commit in the cache
        return Path(hf_hub_download(name, "README.md", repo_type="dataset", revision=revision)).parent.name
    except RemoteEntryNotFoundError:
        return HfApi().dataset_info(name, revision=revision).sha
    except RevisionNotFoundError as error:
        raise ConfigError(f"--dataset_revision {revision}: data set {name!r} has no such revision") from error
    except RepositoryNotFoundError:
        return revision  # the load reports the error
    except LocalEntryNotFoundError as error:
        raise EnvError(
            f"--dataset_revision {revision}: the hub cannot be reached to find which commit of {name!r} that is; "
            "give the commit hash, or set HF_ENDPOINT to a mirror"
        ) from error


def _check_commit(dataset: Any, spec: SourceSpec, commit: str | None) -> None:
    """Check that the requested commit was loaded. Without a network ``datasets`` ignores the revision and uses the
    newest cached copy.

    Raises: EnvError when another commit was loaded.
    """
    loaded = commit_of(dataset)
    if commit and loaded and loaded != commit:
        raise EnvError(
            f"--dataset_revision {spec.dataset_revision}: it cannot be loaded from the hub, and the cache has commit "
            f"{loaded} of {spec.dataset_name!r}; give that commit, or load {commit} once with a network"
        )

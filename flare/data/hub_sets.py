"""Data sets of the Hugging Face hub, through ``datasets``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flare.data.file_formats import missing_column
from flare.data.rows import PIECE_BYTES, Piece, Row, Source, SourceSpec
from flare.errors import ConfigError, DataError, EnvError

BATCH_ROWS = 1000


@dataclass(frozen=True)
class TableSlice(Piece):
    """Rows [begin, end) of a memory-mapped ``datasets.Dataset``, which pickles as the paths of its files."""

    dataset: Any
    column: str
    name: str
    begin: int
    end: int

    def rows(self) -> Iterator[Row]:
        for first in range(self.begin, self.end, BATCH_ROWS):
            values = self.dataset[first : min(first + BATCH_ROWS, self.end)][self.column]
            for number, value in enumerate(values, first):
                yield Row(value, f"{self.name}[{number}]")


@dataclass(frozen=True)
class Shard(Piece):
    """A shard of a streamed ``datasets.IterableDataset``: as a rule, one file of the hub."""

    dataset: Any
    column: str
    name: str
    index: int
    count: int

    def rows(self) -> Iterator[Row]:
        shard = self.dataset.shard(self.count, self.index)
        name = self.name if self.count == 1 else f"{self.name} shard {self.index}"
        for number, record in enumerate(shard):
            yield Row(record[self.column], f"{name}[{number}]")


class HubSource(Source):
    """One split of a data set."""

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

    def pieces(self) -> list[Piece]:
        column, name = self.spec.text_column, self.spec.dataset_name
        dataset = self.dataset.select_columns([column])
        if self.spec.streaming:
            count = dataset.num_shards
            return [Shard(dataset, column, name, index, count) for index in range(count)]
        rows = len(dataset)
        step = max(1, PIECE_BYTES * rows // max(dataset.data.nbytes, 1))
        return [TableSlice(dataset, column, name, begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _load_hub_dataset(spec: SourceSpec) -> object:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    arguments = {
        "name": spec.dataset_config,
        "split": spec.dataset_split,
        "cache_dir": spec.cache_dir,
        "streaming": spec.streaming,
    }
    name = spec.dataset_name
    try:
        try:
            return load_dataset(name, **arguments)
        except RuntimeError as error:
            # datasets >= 4 runs no loading scripts; the hub keeps a parquet copy of most such sets.
            if "script" not in str(error):
                raise
            return load_dataset(name, revision="refs/convert/parquet", **arguments)
    except DatasetNotFoundError as error:
        raise DataError(
            f"data set {name!r} is no local file and cannot be found on the hub; check the name and the "
            "network, set HF_ENDPOINT to a mirror, or give local files"
        ) from error
    except ValueError as error:  # unknown configuration or split: the message lists the known ones
        raise ConfigError(f"data set {name!r}: {str(error).splitlines()[0]}") from error
    except (OSError, ConnectionError) as error:
        raise EnvError(
            f"data set {name!r} cannot be loaded ({type(error).__name__}); set HF_ENDPOINT to a mirror, "
            "HF_HUB_OFFLINE=1 to use what is cached, or give local files"
        ) from error

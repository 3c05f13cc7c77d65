"""Where documents come from: hub data sets, local files and folders, the embedded corpus.

A source yields rows as they are, with the place they came from; what is usable text is decided in
``flare.data.tokens``. Nothing here tokenises.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flare.data.embedded import embedded_documents
from flare.errors import ConfigError, DataError, EnvError

FILE_KINDS = (".jsonl", ".json", ".txt", ".parquet", ".csv")


@dataclass(frozen=True)
class Row:
    """What a source holds where a document's text is expected, and where that is (``file:line``)."""

    value: object
    where: str


class BadRow:
    """The value of a row that could not even be read."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


@dataclass(frozen=True)
class SourceSpec:
    """What the user asked for."""

    dataset_name: str
    text_column: str = "text"
    dataset_config: str | None = None
    dataset_split: str = "train"
    cache_dir: str | None = None
    streaming: bool = False


class Source:
    """Rows of a corpus, in a fixed order, and an identity that changes when its content does."""

    def fingerprint(self) -> str:
        raise NotImplementedError

    def rows(self) -> Iterator[Row]:
        raise NotImplementedError


def open_source(spec: SourceSpec, token_dir: Path) -> Source:
    """The source that ``--dataset_name`` names.

    Raises: ConfigError for a path that is not there, DataError / EnvError for a hub set that cannot be had.
    """
    name = spec.dataset_name
    if name == "embedded":
        return EmbeddedSource(token_dir)
    path = Path(name)
    if path.exists():
        return FileSource(_files(path), spec.text_column)
    looks_local = path.suffix in FILE_KINDS or path.is_absolute() or name.startswith((".", "~"))
    if looks_local or name.count("/") > 1:
        raise ConfigError(f"--dataset_name {name}: no such file or directory (looked in {Path.cwd()})")
    return HubSource(spec)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ConfigError(f"--dataset_name {path}: cannot read {path.suffix!r}; known: {' '.join(FILE_KINDS)}")
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in FILE_KINDS and p.is_file())
    if not files:
        raise DataError(f"--dataset_name {path}: the folder holds none of {' '.join(FILE_KINDS)}")
    return files


class EmbeddedSource(Source):
    """English prose and docstrings that come with every Python (contract, section 1)."""

    def __init__(self, cache: Path) -> None:
        self.documents = embedded_documents(cache)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, text in self.documents:
            digest.update(f"{name}\0{text}\0".encode())
        return f"embedded:{digest.hexdigest()}"

    def rows(self) -> Iterator[Row]:
        for name, text in self.documents:
            yield Row(text, f"embedded:{name}")


class FileSource(Source):
    """Local files, one after the other by name. A .txt file is one document; the others hold a row each line."""

    def __init__(self, files: list[Path], text_column: str) -> None:
        self.files = files
        self.text_column = text_column
        for file in files:
            if file.stat().st_size == 0:
                raise DataError(f"{file} is empty (0 bytes)")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.text_column.encode())
        for file in self.files:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return f"files:{digest.hexdigest()}"

    def rows(self) -> Iterator[Row]:
        readers = {
            ".txt": _read_txt,
            ".jsonl": _read_jsonl,
            ".json": _read_json,
            ".csv": _read_csv,
            ".parquet": _read_parquet,
        }
        for file in self.files:
            yield from readers[file.suffix](file, self.text_column)


def _column(record: object, column: str, where: str, first: bool) -> object:
    """The text of a record; in a file's first record a missing column is the user's mistake."""
    if not isinstance(record, dict):
        return BadRow("is no object")
    if column in record:
        return record[column]
    if first:
        columns = ", ".join(sorted(map(str, record))) or "none"
        raise ConfigError(f"column {column!r} not in {where}; columns: {columns}; use --text_column")
    return BadRow(f"has no column {column!r}")


def _read_txt(file: Path, column: str) -> Iterator[Row]:
    try:
        yield Row(file.read_text(encoding="utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        yield Row(BadRow(f"is not UTF-8 (byte {error.start})"), str(file))


def _read_jsonl(file: Path, column: str) -> Iterator[Row]:
    first = True
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Row(BadRow(f"is not UTF-8 (byte {error.start})"), where)
            except ValueError as error:  # no JSON, or a number that no int holds
                yield Row(BadRow(f"is not JSON ({getattr(error, 'msg', error)})"), where)
            else:
                yield Row(_column(record, column, str(file), first), where)
                first = False


def _read_json(file: Path, column: str) -> Iterator[Row]:
    with open(file, "rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":  # the field writes JSON lines into .json files, too
        yield from _read_jsonl(file, column)
        return
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    for number, record in enumerate(records):
        yield Row(_column(record, column, str(file), number == 0), f"{file}[{number}]")


def _read_csv(file: Path, column: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        for number, record in enumerate(csv.DictReader(stream)):
            yield Row(_column(record, column, str(file), number == 0), f"{file}: row {number + 1}")


def _read_parquet(file: Path, column: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file: {error}") from error
    names = table.schema_arrow.names
    if column not in names:
        raise ConfigError(f"column {column!r} not in {file}; columns: {', '.join(names)}; use --text_column")
    number = 0
    for batch in table.iter_batches(columns=[column], batch_size=1000):
        for value in batch.column(0).to_pylist():
            yield Row(value, f"{file}: row {number}")
            number += 1


class HubSource(Source):
    """A data set of the Hugging Face hub, through ``datasets``."""

    def __init__(self, spec: SourceSpec) -> None:
        self.spec = spec
        self.dataset = _load_hub_dataset(spec)
        names = self.dataset.column_names or [spec.text_column]  # a streamed set may not know them yet
        if spec.text_column not in names:
            raise ConfigError(
                f"column {spec.text_column!r} not in {spec.dataset_name}; columns: {', '.join(names)}; "
                "use --text_column"
            )

    def fingerprint(self) -> str:
        spec = self.spec
        parts = (spec.dataset_name, spec.dataset_config, spec.dataset_split, spec.text_column)
        return ":".join(map(str, ("hub", *parts, self.dataset._fingerprint)))

    def rows(self) -> Iterator[Row]:
        column = self.spec.text_column
        for batch in self.dataset.select_columns([column]).iter(batch_size=1000):
            for number, value in enumerate(batch[column]):
                yield Row(value, f"{self.spec.dataset_name}[{number}]")


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

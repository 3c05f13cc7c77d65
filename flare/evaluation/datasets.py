"""Evaluation data sets: known names, hub names, local files and the embedded corpus."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from flare.data.cache_dir import default_cache_dir
from flare.data.sources.base import COLUMN_HINT, Row, Source, SourceSpec
from flare.data.sources.documents import BadRows, text_hash, usable_texts
from flare.data.sources.file_formats import kind_of
from flare.data.sources.files import is_glob
from flare.data.sources.hub import HubSource
from flare.data.sources.open import open_source, path_of
from flare.data.validation_split import split_documents
from flare.errors import ConfigError, DataError
from flare.evaluation.scoring.lambada import split_last_word
from flare.logs import log

KNOWN = {
    "wikitext2": SourceSpec("Salesforce/wikitext", "text", "wikitext-2-raw-v1", "test"),
    "c4": SourceSpec("allenai/c4", "text", "en", "validation", streaming=True),
    "lambada": SourceSpec("EleutherAI/lambada_openai", "text", None, "test"),
    "pg19": SourceSpec("emozilla/pg19-test", "text", None, "test"),
}
STREAMED_DOCUMENTS = 1000
"""Documents of a streamed data set if ``--max_samples_per_dataset`` is not given."""
EMBEDDED_HELD_OUT_PERCENT = 5
"""Share of the embedded corpus that is evaluated, selected by document hash. Training that holds out at least this
share (as the demo does) has not seen these documents."""
OPTION = "--datasets"
COLUMN_PART = "a file must have this column; for a hub data set, owner/name:config:split:COLUMN names another"
WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n$")


@dataclass(frozen=True)
class DatasetRequest:
    """A parsed value of ``--datasets``.

    ``kind`` decides how rows become documents: the name of a known data set, or "" if each row is a document.
    """

    name: str
    kind: str
    spec: SourceSpec

    @property
    def is_lambada(self) -> bool:
        """Whether LAMBADA's last-word metrics are measured."""
        return self.kind == "lambada"


def load_texts(request: DatasetRequest, max_samples: int | None, mirror: str | None = None) -> list[str]:
    """Documents of a data set, at most ``max_samples``. Rows without usable text are skipped with a warning.

    Args:
        mirror: a directory with copies of hub data sets as ``owner/name``; others are read from the hub.

    Raises: ConfigError for an unknown name or column; DataError or EnvError if the data set cannot be read.
    """
    limit = max_samples if max_samples is not None else STREAMED_DOCUMENTS if request.spec.streaming else None
    bad = BadRows()
    try:
        documents = list(islice(_documents(request, mirror, bad), limit))
    except ConfigError as error:  # the hint of training names --text_column, which does not exist here
        raise ConfigError(str(error).replace(COLUMN_HINT, COLUMN_PART)) from error
    left_out = f"{bad.count} rows without usable text ({'; '.join(bad.first)})"
    if not documents:
        raise DataError(f"data set {request.name!r} holds no document" + (f", {left_out}" if bad.count else ""))
    if bad.count:
        log.warning(f"data set {request.name}: left out {left_out}")
    return documents


def _documents(request: DatasetRequest, mirror: str | None, bad: BadRows) -> Iterator[str]:
    rows = _open(request.spec, mirror).rows()
    if request.kind == "wikitext2":
        return join_pages(_lines(rows, bad))
    if request.is_lambada:
        return _passages(rows, bad)
    texts = usable_texts(rows, bad)
    return iter(held_out(list(texts))) if request.name == "embedded" else texts


def _lines(rows: Iterator[Row], bad: BadRows) -> Iterator[str]:
    """Lines of WikiText: one row each on the hub (blank lines included), all in one row for a .txt file."""
    for row in rows:
        if isinstance(row.value, str) and not row.value.strip():
            yield row.value
        else:
            for text in usable_texts(iter([row]), bad):
                yield from io.StringIO(text, newline="\n")


def _passages(rows: Iterator[Row], bad: BadRows) -> Iterator[str]:
    """Texts that have a context and a last word."""
    for row in rows:
        for text in usable_texts(iter([row]), bad):
            if split_last_word(text):
                yield text
            else:
                bad.add(row, "has no last word after a space")


def _open(spec: SourceSpec, mirror: str | None) -> Source:
    local = Path(mirror) / spec.dataset_name if mirror else None
    if local is not None and local.is_dir():
        return HubSource(replace(spec, dataset_name=str(local)))
    return open_source(spec, default_cache_dir(spec.cache_dir))


def parse_name(word: str, cache_dir: str | None) -> DatasetRequest:
    """Parse a value of ``--datasets``.

    Raises: ConfigError for an unknown name.
    """
    request = _request(word, cache_dir)
    return replace(request, spec=replace(request.spec, option=OPTION))


def _request(word: str, cache_dir: str | None) -> DatasetRequest:
    kind, equals, file = word.partition("=")
    if equals and kind in KNOWN:
        if not file:
            raise ConfigError(f"{OPTION} {word}: give a file after the =")
        return DatasetRequest(kind, kind, SourceSpec(file, KNOWN[kind].text_column, cache_dir=cache_dir))
    if word in KNOWN:
        return DatasetRequest(word, word, replace(KNOWN[word], cache_dir=cache_dir))
    if word == "embedded" or path_of(word) or is_glob(word) or kind_of(Path(word)):
        return DatasetRequest(word, "", SourceSpec(word, cache_dir=cache_dir))
    hub_name, *rest = word.split(":")
    if "/" not in hub_name:
        known = ", ".join([*KNOWN, "embedded"])
        raise ConfigError(f"{OPTION} {word}: no file of that name; known sets: {known}; hub sets: owner/name")
    if len(rest) > 3:
        raise ConfigError(f"{OPTION} {word}: more parts than owner/name:config:split:column")
    config, split, column = (part or None for part in (*rest, None, None, None)[:3])
    return DatasetRequest(word, "", SourceSpec(hub_name, column or "text", config, split or "test", cache_dir))


def join_pages(lines: Iterator[str]) -> Iterator[str]:
    """Join lines of WikiText into pages; a page starts with a line ``= Title =``."""
    page: list[str] = []
    for line in lines:
        if WIKITEXT_TITLE.match(line):
            if "".join(page).strip():
                yield "".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "".join(page)


def held_out(texts: list[str]) -> list[str]:
    """Documents that training has not seen if it holds out at least ``EMBEDDED_HELD_OUT_PERCENT``."""
    hashes = np.array([text_hash(text) for text in texts], dtype=np.uint64)
    return [texts[i] for i in split_documents(hashes, EMBEDDED_HELD_OUT_PERCENT)[1]]

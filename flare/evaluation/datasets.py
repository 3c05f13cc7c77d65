"""The texts that are scored: names of known sets, hub names, local files, the embedded corpus."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from flare.data.cache_dir import default_cache_dir
from flare.data.packing import split_documents
from flare.data.sources.base import COLUMN_HINT, Row, Source, SourceSpec
from flare.data.sources.documents import BadRows, text_hash, usable_texts
from flare.data.sources.file_formats import kind_of
from flare.data.sources.files import is_glob
from flare.data.sources.hub import HubSource
from flare.data.sources.open import open_source, path_of
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
"""Documents of a streamed set when ``--max_samples_per_dataset`` does not say."""
EMBEDDED_HELD_OUT_PERCENT = 5
"""Of the embedded corpus, the share by document hash that is evaluated. Training that holds out this share or
more (the demo does) has not seen these documents."""
OPTION = "--datasets"
COLUMN_PART = "of a file it must be that one, of a hub set owner/name:config:split:COLUMN names another"
WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n$")


@dataclass(frozen=True)
class DatasetRequest:
    """What ``--datasets WORD`` stands for.

    ``kind`` decides how rows become documents: a known set's name, or "" for rows that are documents.
    """

    name: str
    kind: str
    spec: SourceSpec

    @property
    def is_lambada(self) -> bool:
        """Whether the last words are asked for, too."""
        return self.kind == "lambada"


def load_texts(request: DatasetRequest, max_samples: int | None, mirror: str | None = None) -> list[str]:
    """Documents of a data set, at most ``max_samples``; rows without usable text are left out, with a warning.

    Args:
        mirror: a directory in which hub sets lie as ``owner/name``, with the hub's files; one that is not there is
            asked of the hub.

    Raises: ConfigError for a name that means nothing, DataError / EnvError for a set that cannot be had.
    """
    limit = max_samples if max_samples is not None else STREAMED_DOCUMENTS if request.spec.streaming else None
    bad = BadRows()
    try:
        documents = list(islice(_documents(request, mirror, bad), limit))
    except ConfigError as error:  # training has an option for the column
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
    """WikiText's lines: a row each on the hub, where blank ones are text too; all in one row of a .txt file."""
    for row in rows:
        if isinstance(row.value, str) and not row.value.strip():
            yield row.value
        else:
            for text in usable_texts(iter([row]), bad):
                yield from io.StringIO(text, newline="\n")


def _passages(rows: Iterator[Row], bad: BadRows) -> Iterator[str]:
    """Texts that have a last word to ask for."""
    for row in rows:
        for text in usable_texts(iter([row]), bad):
            if split_last_word(text):
                yield text
            else:
                bad.add(row, "has no last word behind a space")


def _open(spec: SourceSpec, mirror: str | None) -> Source:
    local = Path(mirror) / spec.dataset_name if mirror else None
    if local is not None and local.is_dir():
        return HubSource(replace(spec, dataset_name=str(local)))
    return open_source(spec, default_cache_dir(spec.cache_dir))


def parse_name(word: str, cache_dir: str | None) -> DatasetRequest:
    """What ``--datasets WORD`` stands for.

    Raises: ConfigError for a name that means nothing.
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
    """WikiText's lines joined to its pages; a page begins with a line ``= Title =``."""
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
    """The documents that training with at least ``EMBEDDED_HELD_OUT_PERCENT`` held out has not seen."""
    hashes = np.array([text_hash(text) for text in texts], dtype=np.uint64)
    return [texts[i] for i in split_documents(hashes, EMBEDDED_HELD_OUT_PERCENT)[1]]

"""The texts that are scored: names of known sets, hub names, local files, the embedded corpus."""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from flare.data.documents import BadRows, text_hash, usable_texts
from flare.data.file_formats import kind_of
from flare.data.files import is_glob
from flare.data.packing import split_documents
from flare.data.rows import SourceSpec
from flare.data.sources import open_source, path_of
from flare.data.tokens import default_cache_dir
from flare.errors import ConfigError, DataError

DEFAULT_DATASETS = ("wikitext2", "c4", "lambada", "pg19")
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
WIKITEXT_TITLE = re.compile(r"^ = [^=].* = \n$")


def load_texts(name: str, max_samples: int | None, cache_dir: str | None = None) -> list[str]:
    """Documents of a data set, at most ``max_samples``, those without text left out.

    Args:
        name: wikitext2, c4, lambada, pg19, embedded, a local file or folder, or
            ``owner/name[:config[:split[:column]]]`` of the hub.
    Raises: ConfigError for a name that means nothing, DataError / EnvError for a set that cannot be had.
    """
    spec = parse_name(name, cache_dir)
    source = open_source(spec, default_cache_dir(cache_dir))
    texts: Iterator[str] = usable_texts(source.rows(), BadRows())
    if name == "wikitext2":
        texts = join_pages(row.value for row in source.rows())
    if name == "embedded":
        texts = iter(held_out(list(texts)))
    limit = max_samples if max_samples is not None else STREAMED_DOCUMENTS if spec.streaming else None
    documents = list(islice(texts, limit))
    if not documents:
        raise DataError(f"data set {name!r} holds no document")
    return documents


def parse_name(name: str, cache_dir: str | None) -> SourceSpec:
    """What ``--datasets NAME`` stands for."""
    if name in KNOWN:
        known = KNOWN[name]
        return SourceSpec(
            known.dataset_name,
            known.text_column,
            known.dataset_config,
            known.dataset_split,
            cache_dir,
            known.streaming,
        )
    if name == "embedded" or path_of(name) or is_glob(name) or kind_of(Path(name)):
        return SourceSpec(name, cache_dir=cache_dir)
    hub_name, *rest = name.split(":")
    if "/" not in hub_name:
        known = ", ".join([*KNOWN, "embedded"])
        raise ConfigError(f"--datasets {name}: no file of that name; known sets: {known}; hub sets: owner/name")
    config, split, column = (part or None for part in (*rest, None, None, None)[:3])
    return SourceSpec(hub_name, column or "text", config, split or "test", cache_dir)


def join_pages(lines: Iterator[str]) -> Iterator[str]:
    """WikiText's lines joined to its pages; a page begins with a line ``= Title =``."""
    page: list[str] = []
    for line in lines:
        if WIKITEXT_TITLE.match(line) and page:
            yield "".join(page)
            page = []
        page.append(line)
    if "".join(page).strip():
        yield "".join(page)


def held_out(texts: list[str]) -> list[str]:
    """The documents that training with at least ``EMBEDDED_HELD_OUT_PERCENT`` held out has not seen."""
    hashes = np.array([text_hash(text) for text in texts], dtype=np.uint64)
    return [texts[i] for i in split_documents(hashes, EMBEDDED_HELD_OUT_PERCENT)[1]]

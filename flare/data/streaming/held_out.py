"""The survey of a streamed corpus, before its first row: the held-out documents, and the end of ``--dataset_size``.

It reads the first rows in the order of the data and tokenizes only held-out documents. The result is kept in
``--cache_dir``, where a later start and the other ranks of the host find it.
"""

import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from flare.data.packing import PackedRows
from flare.data.sources.base import Piece, Source, read_rows
from flare.data.sources.documents import BadRows, text_hash, usable_texts
from flare.data.streaming.pieces import shortened, streamed_facts, streamed_identity, streamed_pieces
from flare.data.token_cache.build import check_bad_rows, too_many_bad
from flare.data.token_cache.cache import TokenCache, TokenSettings, cache_key, open_complete, remove_damaged
from flare.data.token_cache.encode import Encoder, tokenizer_sha256
from flare.data.validation_split import SINGLE_DOCUMENT
from flare.errors import ConfigError, DataError, EnvError
from flare.files import write_json
from flare.logs import log

FORMAT_VERSION = 2
MAX_HELD_OUT_DOCUMENTS = 128
"""The first held-out documents are evaluated on. At 0.1 % the survey reads about 130,000 documents to find them."""
MAX_SURVEYED_ROWS = 1_000_000
"""Maximum number of rows read to find them, unless ``--dataset_size`` is larger."""


class StreamedCorpus:
    """A corpus that is streamed: its pieces, and what the survey found.

    It has the attributes of a ``Corpus`` that the log and the identity of a run read. ``held_out`` is a token cache.
    """

    def __init__(self, source: Source, tokenizer: object, held_out: TokenCache, settings: TokenSettings) -> None:
        made_with = {"tokenizer": f"sha256 {held_out.meta['tokenizer'][:12]}"}
        made_with["dataset_size"] = str(settings.dataset_size)
        self.facts = shortened(streamed_facts(source)) | made_with
        self.meta = held_out.meta
        self.held_out = held_out
        self.encoder = Encoder.of(tokenizer)
        self.settings = settings
        limits = self.meta["limits"]
        self.pieces = streamed_pieces(source)[: len(limits)] if limits else streamed_pieces(source)
        self.limits = limits or [None] * len(self.pieces)

    @property
    def fingerprint(self) -> str:
        return self.meta["fingerprint"]

    @property
    def end_of_text_id(self) -> int:
        return self.meta["end_of_text_id"]

    def held_out_rows(self, seq_len: int, packing: str) -> PackedRows:
        """The held-out documents."""
        documents = np.arange(self.meta["num_documents"])
        return PackedRows(self.held_out, documents, seq_len, packing, keep_last=True)


def open_streamed(
    source: Source, tokenizer: object, cache_dir: Path, settings: TokenSettings, percentage: float
) -> StreamedCorpus:
    """Survey a corpus, unless the result exists. One process reads while the others wait for its lock.

    Raises: ConfigError for a tokenizer in Python; EnvError for a --cache_dir that cannot be written; DataError for too
    many bad rows or too few documents.
    """
    encoder = Encoder.of(tokenizer)
    if not encoder.is_fast:
        raise ConfigError("--streaming needs a tokenizer with tokenizer.json, because workers cannot load others")
    data = streamed_identity(streamed_facts(source))
    key = cache_key(data, tokenizer_sha256(tokenizer), settings, format=FORMAT_VERSION, streaming=True)
    directory = cache_dir / f"held-out-{key['fingerprint']}-{percentage:g}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / f".{directory.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held_out = open_complete(directory)
            if held_out is None:
                remove_damaged(directory)
                found = survey(streamed_pieces(source), settings, percentage)
                write_held_out(found, encoder, tokenizer, directory, key)
                held_out = TokenCache(directory)
    except OSError as error:
        raise EnvError(f"cannot write to --cache_dir {cache_dir}: {error.strerror or error}") from error
    return StreamedCorpus(source, tokenizer, held_out, settings)


@dataclass
class SurveyResult:
    """The result of a survey.

    ``below``: documents whose hash is lower are held out. ``texts``: the first of them.
    ``limits``: rows to take of each piece when ``--dataset_size`` cuts the corpus, else None.
    """

    below: int
    texts: list[str] = field(default_factory=list)
    rows: int = 0
    documents: int = 0
    bad: BadRows = field(default_factory=BadRows)
    limits: list[int] | None = None
    lowest: tuple[int, str] | None = None
    second_lowest_hash: int | None = None
    is_complete: bool = False

    def add(self, text: str) -> None:
        """Add a document."""
        text_digest = text_hash(text)
        self.documents += 1
        if text_digest < self.below and len(self.texts) < MAX_HELD_OUT_DOCUMENTS:
            self.texts.append(text)
        if self.lowest is None or text_digest < self.lowest[0]:
            self.second_lowest_hash = self.lowest and self.lowest[0]
            self.lowest = text_digest, text
        elif text_digest > self.lowest[0] and (
            self.second_lowest_hash is None or text_digest < self.second_lowest_hash
        ):
            self.second_lowest_hash = text_digest


def survey(pieces: list[Piece], settings: TokenSettings, percentage: float) -> SurveyResult:
    """Read the first rows of a corpus: all of ``--dataset_size``, or until enough documents are held out.

    Raises: DataError for too many bad rows among them, or fewer than two different documents.
    """
    found = SurveyResult(below=int(min(percentage / 100 * 2**64, 2**64 - 1)))
    size, limits = settings.dataset_size, []
    for piece in pieces:
        before = found.rows
        for text in usable_texts(_counted(piece, found, settings), found.bad):
            found.add(text)
            if size is None and (len(found.texts) == MAX_HELD_OUT_DOCUMENTS or found.rows >= MAX_SURVEYED_ROWS):
                return _finish_survey(found, settings)
        limits.append(found.rows - before)
        if size is not None and found.rows >= size:
            break
    found.is_complete = True
    found.limits = limits if size is not None else None
    return _finish_survey(found, settings)


def _counted(piece: Piece, found: SurveyResult, settings: TokenSettings) -> Iterator:
    """The piece's rows up to ``--dataset_size``. Raises: DataError when too many of those before are bad."""
    size = settings.dataset_size
    for row in islice(read_rows(piece), None if size is None else size - found.rows):
        if too_many_bad(found.bad.count, found.rows, settings.max_bad_rows, size):
            check_bad_rows(found.bad, found.rows - found.bad.count, settings.max_bad_rows)
        found.rows += 1
        yield row


def _finish_survey(found: SurveyResult, settings: TokenSettings) -> SurveyResult:
    """Ensure at least one document on each side of the split, like ``split_documents``."""
    if found.is_complete:
        check_bad_rows(found.bad, found.documents, settings.max_bad_rows)
    if not found.documents:
        raise DataError(f"the data holds no usable document ({found.bad.count} rows without text)")
    text_digest, text = found.lowest
    if found.second_lowest_hash is None:
        raise DataError(SINGLE_DOCUMENT)
    if not found.texts or len(found.texts) == found.documents:
        found.below, found.texts = text_digest + 1, [text]
    return found


def write_held_out(found: SurveyResult, encoder: Encoder, tokenizer: object, directory: Path, key: dict) -> None:
    """Tokenise the held-out documents and write them as a token cache."""
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    documents = encoder.encode(found.texts)
    offsets = np.cumsum([0, *map(len, documents)])
    (temporary / "tokens.bin").write_bytes(np.concatenate(documents).tobytes())
    np.save(temporary / "offsets.npy", offsets)
    np.save(temporary / "hashes.npy", np.array([text_hash(text) for text in found.texts], np.uint64))
    meta = {
        "dtype": encoder.dtype.name,
        "num_documents": len(documents),
        "num_tokens": int(offsets[-1]),
        "surveyed_rows": found.rows,
        "held_out_below": found.below,
        "limits": found.limits,
        "end_of_text_id": encoder.end_id,
        "end_of_text": tokenizer.convert_ids_to_tokens(encoder.end_id),
    }
    write_json(temporary / "meta.json", key | meta)
    temporary.rename(directory)
    log.info(
        f"read {found.rows:,} rows to hold out {len(documents)} documents, {offsets[-1]:,} tokens, from streaming"
    )

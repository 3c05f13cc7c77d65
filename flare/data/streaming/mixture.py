"""Streams several data sets at once. The weights decide from which data set the row at a position is read.

Each data set is a separate stream with its own positions, which ``flare.data.mixture`` computes from the position in
the run. A checkpoint records the place of every stream.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from flare.data.cache_dir import default_cache_dir
from flare.data.mixture import MixedRows, Turns, block_counts, check_weights, seed_of
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.sources.open import open_source
from flare.data.streaming.held_out import StreamedCorpus, open_streamed
from flare.data.streaming.rows import KEPT_STEPS, StreamedRows, StreamSettings
from flare.data.token_cache.cache import TokenSettings
from flare.data.training_rows import Batch, TrainRows
from flare.distributed.process_group import World
from flare.errors import ConfigError, FlareError


@dataclass(frozen=True)
class StreamedMixture:
    """Streamed corpora in the user's order, with their weights.

    It has the attributes of a ``StreamedCorpus`` that the log and the identity of a run read.
    """

    names: tuple[str, ...]
    corpora: tuple[StreamedCorpus, ...]
    weights: tuple[float, ...]

    @property
    def counts(self) -> list[int]:
        """Rows of each data set in a block of positions."""
        return block_counts(list(self.weights))

    @property
    def fingerprint(self) -> str:
        """Identity of all rows and of their order in the mixture."""
        key = [[corpus.fingerprint for corpus in self.corpora], self.counts]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    @property
    def meta(self) -> dict:
        """The facts that all corpora share: the end-of-text token."""
        return self.corpora[0].meta

    @property
    def end_of_text_id(self) -> int:
        return self.corpora[0].end_of_text_id

    @property
    def facts(self) -> dict[str, str]:
        """What the rows depend on, by name, for ``what_changed`` at a later start."""
        facts = {"dataset_weights": ",".join(map(str, self.weights))}
        for name, corpus in zip(self.names, self.corpora, strict=True):
            facts |= {f"{name}: {what}": content for what, content in corpus.facts.items()}
        return facts

    def held_out_rows(self, seq_len: int, packing: str) -> MixedRows:
        """The held-out documents of all data sets."""
        parts = [corpus.held_out_rows(seq_len, packing) for corpus in self.corpora]
        return MixedRows(list(self.names), parts, spread=True)


def open_streams(
    specs: list[SourceSpec], weights: list[float] | None, tokenizer: object, settings: TokenSettings, percentage: float
) -> StreamedCorpus | StreamedMixture:
    """One streamed data set, or several; all are opened before the first is read.

    Raises: ConfigError for several data sets without weights, or a wrong number of weights; as ``open_streamed``.
    """
    names = [spec.dataset_name for spec in specs]
    if weights is not None:
        check_weights(weights, names)
    elif len(specs) > 1:
        raise ConfigError(
            f"--streaming of {len(specs)} data sets needs --dataset_weights, one for each, because their "
            "numbers of rows are unknown"
        )
    cache_dir = default_cache_dir(specs[0].cache_dir)
    sources = [open_source(spec, cache_dir) for spec in specs]
    corpora = [open_streamed(source, tokenizer, cache_dir, settings, percentage) for source in sources]
    return StreamedMixture(tuple(names), tuple(corpora), tuple(weights)) if weights else corpora[0]


class MixedStreams(TrainRows):
    """Rows of several streams by position in the run. Index ``i * num_sets + k`` is row i of set k.

    Each stream uses its share of the cores, at least one, and shuffles its share of ``block_rows`` plus a few rows,
    because a step may read a few rows more than the share, and a block must have the rows of ``KEPT_STEPS`` + 1 steps.
    """

    def __init__(self, mixture: StreamedMixture, settings: StreamSettings) -> None:
        self.names, self.turns = mixture.names, Turns(mixture.counts)
        self.recorded_sets: list[dict | None] = []
        self.share = self.turns.counts / self.turns.block
        self.streams = [
            StreamedRows(corpus, self._settings_of(k, settings)) for k, corpus in enumerate(mixture.corpora)
        ]

    def _settings_of(self, k: int, settings: StreamSettings) -> StreamSettings:
        share = -(-settings.block_rows * int(self.turns.counts[k]) // self.turns.block)
        more = len(self.names) + 1  # both ends of a step deviate from the share by at most half of this
        return replace(
            settings,
            seed=seed_of(settings.seed, k),
            block_rows=share + (KEPT_STEPS + 1) * more,
            num_workers=max(round(settings.num_workers * self.share[k]), 1),
        )

    def start(self, world: World, recorded: dict | None, step_rows: int) -> None:
        """Start the producers of all data sets. A collective. Arguments: as ``StreamedRows.start``."""
        self.recorded_sets = recorded["sets"] if recorded else [None] * len(self.streams)
        per_step = most_rows(self.turns, step_rows)
        for stream, own, most in zip(self.streams, self.recorded_sets, per_step, strict=True):
            stream.start(world, own and own["place"], most)

    def close(self) -> None:
        """Stop all producers."""
        for stream in self.streams:
            stream.close()

    def order(self, _seed: int) -> "MixedStreams":
        """Return self, because streamed rows are already in order."""
        return self

    def rows(self, first: int, last: int) -> np.ndarray:
        """Row indices at positions [first, last). Raises: as ``StreamedRows.rows``, with the name of the data set."""
        rows = np.empty(last - first, dtype=np.int64)
        for k, places, begin, end in self.turns.between(first, last):
            with self._named(k):
                rows[places] = self.streams[k].rows(begin, end) * len(self.streams) + k
        return rows

    @contextmanager
    def _named(self, k: int) -> Iterator[None]:
        try:
            yield
        except FlareError as error:
            raise type(error)(f"data set {self.names[k]}: {error}") from error

    def num_targets(self, rows: np.ndarray) -> int:
        """Number of targets in these rows, without reading them."""
        return sum(self.streams[k].num_targets(inside) for k, _, inside in self._by_set(rows))

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of rows that ``rows`` returned, in the same order."""
        shape = len(rows), self.streams[0].settings.seq_len
        joined = Batch(*(np.empty(shape, dtype=np.int64) for _ in range(3)))
        for k, places, inside in self._by_set(rows):
            batch = self.streams[k].batch(inside)
            joined.input_ids[places], joined.labels[places] = batch.input_ids, batch.labels
            joined.position_ids[places] = batch.position_ids
        return joined

    def _by_set(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(data set, indices into ``rows``, rows of the data set) for each data set with rows among them."""
        inside, sets = np.divmod(np.asarray(rows, dtype=np.int64), len(self.streams))
        for k in np.unique(sets):
            yield int(k), np.flatnonzero(sets == k), inside[sets == k]

    def any_row(self) -> int:
        """The index of a row that can be read at the moment."""
        k = next(k for k, stream in enumerate(self.streams) if stream.blocks)
        return self.streams[k].any_row() * len(self.streams) + k

    def place_at(self, position: int) -> dict:
        """The record for a checkpoint: for each stream its position, its place there, and the epochs up to it."""
        return {"sets": [self._place_of(k, int(own)) for k, own in enumerate(self.turns.taken(position))]}

    def _place_of(self, k: int, own: int) -> dict:
        recorded, stream = self.recorded_sets[k], self.streams[k]
        if recorded and recorded["rows"] == own:  # no row of this data set was read since the start
            return recorded
        return {"rows": own, "place": stream.place_at(own), "epochs": stream.epochs(own)}

    def epochs(self, position: int) -> float:
        """Epochs up to a position: the average of the data sets, by weight."""
        return float(np.dot(self.share, [place["epochs"] for place in self.place_at(position)["sets"]]))

    def describe(self) -> str:
        """A line for the log."""
        sets = [
            f"{name} ({share:.1%}) {stream.describe()}"
            for name, share, stream in zip(self.names, self.share, self.streams, strict=True)
        ]
        return "; ".join(sets)


def most_rows(turns: Turns, step_rows: int) -> list[int]:
    """Maximum rows of each data set in a step of ``step_rows`` positions, at least 1, wherever the step starts."""
    counts = [turns.taken(first + step_rows) - turns.taken(first) for first in range(turns.block)]
    return np.maximum(np.max(counts, axis=0), 1).tolist()


def streamed_rows(
    corpus: StreamedCorpus | StreamedMixture, settings: StreamSettings
) -> tuple[StreamedRows | MixedStreams, PackedRows | MixedRows]:
    """(training rows, held-out rows)."""
    held_out = corpus.held_out_rows(settings.seq_len, settings.packing)
    if isinstance(corpus, StreamedMixture):
        return MixedStreams(corpus, settings), held_out
    return StreamedRows(corpus, settings), held_out

"""The data of a run: one tokenised data set, or several with weights.

Every data set has its own token cache. Adding a set or changing the weights does not tokenise the others again.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flare.data.mixture import MixedRows, block_counts, check_weights
from flare.data.packing import PackedRows
from flare.data.sources.base import Source, SourceSpec
from flare.data.sources.open import open_source, path_of
from flare.data.token_cache.build import build_token_cache
from flare.data.token_cache.cache import TokenCache, TokenSettings
from flare.data.validation_split import split_documents
from flare.errors import ConfigError, DataError

SHOWN_CHANGES = 5


@dataclass(frozen=True)
class DataSet:
    """A tokenised data set. ``facts`` describe its files and settings; ``what_changed`` compares them."""

    name: str
    cache: TokenCache
    facts: dict[str, str]

    @classmethod
    def open(cls, name: str, source: Source, tokenizer: object, cache_dir: Path, settings: TokenSettings) -> "DataSet":
        """Open the token cache of a data set, and build it if it is missing. Raises: as ``build_token_cache``."""
        cache = build_token_cache(source, tokenizer, cache_dir, settings)
        made_with = {"tokenizer": f"sha256 {cache.meta['tokenizer'][:12]}", "dataset_size": str(settings.dataset_size)}
        return cls(name, cache, source.describe() | made_with)


@dataclass(frozen=True)
class Corpus:
    """The data sets of a run, in the user's order. Without ``weights`` each is read in proportion to its rows."""

    sets: tuple[DataSet, ...]
    weights: tuple[float, ...] | None = None

    @property
    def fingerprint(self) -> str:
        """Identity of all rows and of how they are mixed."""
        if len(self.sets) == 1:
            return self.sets[0].cache.fingerprint
        key = [[data.cache.fingerprint for data in self.sets], self.weights and block_counts(list(self.weights))]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]

    @property
    def meta(self) -> dict:
        """Metadata of the first cache. The end-of-text token is the same in all caches."""
        return self.sets[0].cache.meta

    @property
    def end_of_text_id(self) -> int:
        return self.sets[0].cache.end_of_text_id

    @property
    def facts(self) -> dict[str, str]:
        """Description of the data, for ``what_changed`` at a later start."""
        if len(self.sets) == 1:
            return self.sets[0].facts
        facts = {"dataset_weights": ",".join(map(str, self.weights)) if self.weights else "by size"}
        for data in self.sets:
            facts |= {f"{data.name}: {what}": content for what, content in data.facts.items()}
        return facts

    def rows(self, percentage: float, seq_len: int, packing: str) -> tuple[PackedRows | MixedRows, ...]:
        """(training rows, held-out rows), split by document hash over all sets: copies of a document stay together.

        Raises: DataError for a data set with less than one row of training tokens.
        """
        hashes = [data.cache.hashes for data in self.sets]
        train, held_out = split_documents(hashes[0] if len(hashes) == 1 else np.concatenate(hashes), percentage)
        bounds = np.cumsum([0, *map(len, hashes)])
        train_parts = self._packed(by_set(train, bounds), seq_len, packing)
        held_out_parts = self._packed(by_set(held_out, bounds), seq_len, packing, keep_last=True)
        if len(self.sets) == 1:
            return train_parts[0], held_out_parts[0]
        names = [data.name for data in self.sets]
        for name, part in zip(names, train_parts, strict=True):
            if len(part) == 0:
                raise DataError(
                    f"data set {name} gives {part.num_tokens:,} training tokens, not one row of {seq_len}; leave it "
                    "out or lower --max_seq_length"
                )
        counts = block_counts(list(self.weights)) if self.weights else None
        return MixedRows(names, train_parts, counts), MixedRows(names, held_out_parts, spread=True)

    def _packed(
        self, documents: list[np.ndarray], seq_len: int, packing: str, keep_last: bool = False
    ) -> list[PackedRows]:
        """Rows of these documents of each set."""
        caches = [data.cache for data in self.sets]
        return [PackedRows(c, d, seq_len, packing, keep_last) for c, d in zip(caches, documents, strict=True)]


def by_set(documents: np.ndarray, bounds: np.ndarray) -> list[np.ndarray]:
    """Document indices over all sets -> indices within each set."""
    cuts = np.searchsorted(documents, bounds[1:-1])
    return [side - first for side, first in zip(np.split(documents, cuts), bounds[:-1], strict=True)]


def open_corpus(
    specs: list[SourceSpec], weights: list[float] | None, tokenizer: object, cache_dir: Path, settings: TokenSettings
) -> Corpus:
    """Open and tokenise data sets. All are opened before the first is tokenised, so that errors appear early.

    Raises: ConfigError, DataError or EnvError of a source; ConfigError for invalid weights.
    """
    names = [spec.dataset_name for spec in specs]
    if weights is not None:
        check_weights(weights, names)
    sources = [open_source(spec, cache_dir) for spec in specs]
    sets = [
        DataSet.open(name, source, tokenizer, cache_dir, settings) for name, source in zip(names, sources, strict=True)
    ]
    return Corpus(tuple(sets), tuple(weights) if weights else None)


def split_specs(spec: SourceSpec) -> list[SourceSpec]:
    """One specification for each data set of ``--dataset_name a,b``.

    Column, configuration, split and revision have one value for all sets, or one value per set separated by commas
    (an empty value means the default).

    Raises: ConfigError for lists of different lengths, or for a data set that is named twice.
    """
    names = split_names(spec.dataset_name)
    if len(names) == 1:
        return [spec]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"--dataset_name names {twice[0]} twice; give it once, and its share with --dataset_weights")
    lists: dict[str, list[str | None]] = {"dataset_name": names}
    for field in ("text_column", "dataset_config", "dataset_split", "dataset_revision"):
        value = getattr(spec, field)
        parts = value.split(",") if value is not None and "," in value else [value] * len(names)
        if len(parts) != len(names):
            raise ConfigError(f"--{field} {value} names {len(parts)}, --dataset_name {len(names)} data sets")
        default = SourceSpec.__dataclass_fields__[field].default
        lists[field] = [part if part is None else part.strip() or default for part in parts]
    return [replace(spec, **dict(zip(lists, values, strict=True))) for values in zip(*lists.values(), strict=True)]


def split_names(text: str) -> list[str]:
    """Split ``--dataset_name`` at its commas, except at commas that are part of an existing path."""
    parts, names = text.split(","), []
    while parts:
        for count in range(len(parts), 0, -1):
            name = ",".join(parts[:count])
            if count == 1 or path_of(name) is not None:
                break
        names.append(name.strip())
        parts = parts[count:]
    return [name for name in names if name] or [text]


def what_changed(then: dict[str, str] | None, now: dict[str, str]) -> str | None:
    """The differences between two descriptions as text; None if there are none or ``then`` is unknown."""
    changes = []
    for what in sorted((then or {}).keys() | now):
        before, after = (then or {}).get(what), now.get(what)
        if before is None:
            changes.append(f"{what} is new")
        elif after is None:
            changes.append(f"{what} is gone")
        elif before != after:
            changes.append(f"{what}: {before} -> {after}")
    if not then or not changes:
        return None
    more = f" and {len(changes) - SHOWN_CHANGES} more changes" if len(changes) > SHOWN_CHANGES else ""
    return ", ".join(changes[:SHOWN_CHANGES]) + more

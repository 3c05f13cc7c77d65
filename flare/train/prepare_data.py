"""Prepares the data of a run: tokens, training rows and held-out rows, before the process group starts."""

import math
import os
from pathlib import Path

import numpy as np

from flare.config.options import Options
from flare.config.parse import ResolvedOptions
from flare.data.cache_dir import default_cache_dir
from flare.data.corpus import Corpus, open_corpus, split_specs
from flare.data.mixture import MixedRows
from flare.data.packing import PackedRows
from flare.data.sources.base import SourceSpec
from flare.data.streaming.held_out import StreamedCorpus
from flare.data.streaming.mixture import MixedStreams, StreamedMixture, open_streams, streamed_rows
from flare.data.streaming.rows import KEPT_STEPS, StreamedRows, StreamSettings
from flare.data.token_cache.cache import TokenSettings
from flare.data.training_rows import TrainRows
from flare.errors import ConfigError, DataError
from flare.hub import TOKENIZER_FILES, local_model_dir, read_model_config
from flare.logs import start_logging
from flare.nope.load import load_tokenizer
from flare.plan.model_shape import ModelShape
from flare.run.experiment import Experiment
from flare.run.resolve import choose_init_from
from flare.run.run import Run

AnyCorpus = Corpus | StreamedCorpus | StreamedMixture

BLOCK_ROWS = 2**20
"""Rows checked for targets at a time. Usually the first block has some."""


def prepare_data(run: Run) -> AnyCorpus:
    """The tokenised data of this run. If it is missing, one process builds it while the others wait for its lock.
    With ``--streaming``: the streamed corpus, of which only the first rows have been read.

    Call this before the process group starts, because a long build would exceed the group's timeout.
    """
    return tokenised_corpus(run.options, run.init_from, run.config)


def tokenised_corpus(options: Options, model_dir: Path, config: dict) -> AnyCorpus:
    """The data set of the options as tokens of a model; with ``--streaming`` not tokenised yet.

    Raises: ConfigError for a tokenizer that does not belong to the model's ``config``.
    """
    spec = SourceSpec(
        options.dataset_name,
        options.text_column,
        options.dataset_config,
        options.dataset_split,
        options.cache_dir,
        options.streaming,
        options.dataset_revision,
    )
    tokenizer = load_tokenizer(model_dir)
    rows = int(config["vocab_size"])
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer of {model_dir} has {len(tokenizer)} ids but the embedding {rows} rows; they do not "
            "belong together"
        )
    settings = TokenSettings(options.dataset_size, options.max_bad_rows, options.preprocessing_num_workers)
    specs, weights = split_specs(spec), options.dataset_weights
    if options.streaming:
        return open_streams(specs, weights, tokenizer, settings, options.validation_split_percentage)
    return open_corpus(specs, weights, tokenizer, default_cache_dir(options.cache_dir), settings)


def packed_rows(run: Run, corpus: AnyCorpus) -> tuple[TrainRows, PackedRows | MixedRows]:
    """(training rows, held-out rows).

    Raises: DataError when the data has fewer tokens than one step.
    """
    options = run.options
    if not isinstance(corpus, Corpus):
        return streamed_rows_of(run, corpus)
    train_rows, eval_rows = corpus.rows(options.validation_split_percentage, options.max_seq_length, options.packing)
    if len(train_rows) < run.global_batch_size:
        raise DataError(
            f"the data gives {train_rows.num_tokens:,} training tokens, one step needs "
            f"{run.global_batch_size * options.max_seq_length + 1:,}; lower --max_seq_length or the batch size"
        )
    check_can_train(train_rows)
    check_can_evaluate(eval_rows, options.max_eval_samples)
    return train_rows, eval_rows


def streamed_rows_of(
    run: Run, corpus: StreamedCorpus | StreamedMixture
) -> tuple[StreamedRows | MixedStreams, PackedRows | MixedRows]:
    """(training rows, held-out rows) of a streamed corpus.

    Raises: ConfigError when the shuffle buffer has fewer rows than ``KEPT_STEPS + 1`` steps.
    """
    options = run.options
    least = (KEPT_STEPS + 1) * run.global_batch_size
    if options.streaming_buffer_rows < least:
        raise ConfigError(
            f"--streaming_buffer_rows {options.streaming_buffer_rows} must be at least {least}, the rows of "
            f"{KEPT_STEPS + 1} steps"
        )
    settings = StreamSettings(
        seq_len=options.max_seq_length,
        packing=options.packing,
        seed=options.seed,
        block_rows=options.streaming_buffer_rows,
        cache_dir=default_cache_dir(options.cache_dir),
        num_workers=options.preprocessing_num_workers or spare_cores(),
    )
    train_rows, eval_rows = streamed_rows(corpus, settings)
    check_can_evaluate(eval_rows, options.max_eval_samples)
    return train_rows, eval_rows


def spare_cores() -> int:
    """Cores of this host that its training processes do not use, at least one."""
    return max(1, len(os.sched_getaffinity(0)) - int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def check_can_train(train_rows: TrainRows) -> None:
    """Raises: DataError when there is no row, or no row has a target. Single rows without targets are skipped."""
    if len(train_rows) == 0:
        raise DataError(
            f"the data gives {train_rows.num_tokens:,} training tokens, not one row; lower --max_seq_length"
        )
    blocks = (np.arange(i, min(i + BLOCK_ROWS, len(train_rows))) for i in range(0, len(train_rows), BLOCK_ROWS))
    if not any(train_rows.num_targets(rows) for rows in blocks):
        raise DataError("the training documents are single tokens: nothing can be learned; give longer documents")


def check_can_evaluate(eval_rows: PackedRows, max_rows: int | None) -> None:
    """Raises: DataError when the held-out rows that are used have no target."""
    if eval_rows.num_targets(np.arange(len(eval_rows))[:max_rows]) == 0:
        raise DataError("the held-out documents are single tokens: nothing can be evaluated; give longer documents")


def max_steps(run: Run, train_rows: TrainRows, global_batch_size: int) -> int:
    """Steps of the run: ``--max_steps``, or the steps of ``--num_train_epochs``."""
    options = run.options
    if options.num_train_epochs is not None:
        return math.ceil(options.num_train_epochs * len(train_rows) / global_batch_size)
    return options.max_steps


def prepare_only(resolved: ResolvedOptions) -> list[str]:
    """Build the token cache if it does not exist. Returns a summary of its content, line by line.

    Only the tokenizer of a hub model is downloaded.

    Raises: DataError when training would refuse the data, except for reasons that depend on the batch size.
    """
    options = resolved.options
    start_logging()
    name, _reason = choose_init_from(resolved, Experiment(options.experiment_dir))
    directory = local_model_dir(name, options.cache_dir, TOKENIZER_FILES)
    config = read_model_config(directory)
    ModelShape.from_config(config, str(directory))  # refuses other model families
    corpus = tokenised_corpus(options, directory, config)
    train, held_out = corpus.rows(options.validation_split_percentage, options.max_seq_length, options.packing)
    check_can_train(train)
    check_can_evaluate(held_out, options.max_eval_samples)
    meta, caches = corpus.meta, [data.cache for data in corpus.sets]
    documents, tokens = (sum(cache.meta[key] for cache in caches) for key in ("num_documents", "num_tokens"))
    return [
        f"data: {options.dataset_name}, tokenizer of {name}",
        f"documents: {documents:,} ({held_out.num_documents:,} of them held out)",
        f"tokens: {tokens:,} (documents end with {meta['end_of_text']}, {meta['end_of_text_id']})",
        f"rows to train on: {len(train):,} of {options.max_seq_length} tokens",
        f"bytes: {sum(size_of(cache.directory) for cache in caches):,}",
        *(f"path: {cache.directory}" for cache in caches),
    ]


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(file.stat().st_size for file in directory.iterdir())

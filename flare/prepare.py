"""The data of a run: from its options to training rows and held-out rows, before any process group."""

import math
from pathlib import Path

import numpy as np

from flare.data.corpus import Corpus, open_corpus, split_specs
from flare.data.mixture import MixedRows
from flare.data.packing import PackedRows
from flare.data.rows import SourceSpec
from flare.data.tokens import TokenSettings, default_cache_dir
from flare.errors import ConfigError, DataError
from flare.nope.load import load_tokenizer
from flare.options import Options
from flare.setup import Run


def prepare_data(run: Run) -> Corpus:
    """The tokenised data of this run; built when missing, by one process while the others wait on its lock.

    Call before the process group starts: a long build would run into its timeout.
    """
    return tokenised_corpus(run.options, run.init_from, run.config)


def tokenised_corpus(options: Options, model_dir: Path, config: dict) -> Corpus:
    """The data that the options name, as tokens of a model.

    Raises: ConfigError for a tokenizer that does not belong to the model's ``config``.
    """
    spec = SourceSpec(
        options.dataset_name,
        options.text_column,
        options.dataset_config,
        options.dataset_split,
        options.cache_dir,
        dataset_revision=options.dataset_revision,
    )
    tokenizer = load_tokenizer(model_dir)
    rows = int(config["vocab_size"])
    if len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer of {model_dir} has {len(tokenizer)} ids but the embedding {rows} rows; they do not "
            "belong together"
        )
    settings = TokenSettings(options.dataset_size, options.max_bad_rows, options.preprocessing_num_workers)
    cache_dir = default_cache_dir(options.cache_dir)
    return open_corpus(split_specs(spec), options.dataset_weights, tokenizer, cache_dir, settings)


def packed_rows(run: Run, corpus: Corpus) -> tuple[PackedRows | MixedRows, PackedRows | MixedRows]:
    """(training rows, held-out rows).

    Raises: DataError when the data gives fewer tokens than one step.
    """
    options = run.options
    train_rows, eval_rows = corpus.rows(options.validation_split_percentage, options.max_seq_length, options.packing)
    if len(train_rows) < run.global_batch_size:
        raise DataError(
            f"the data gives {train_rows.num_tokens:,} training tokens, one step needs "
            f"{run.global_batch_size * options.max_seq_length + 1:,}; lower --max_seq_length or the batch size"
        )
    if eval_rows.num_targets(np.arange(len(eval_rows))) == 0:
        raise DataError("the held-out documents are single tokens: nothing can be evaluated; give longer documents")
    return train_rows, eval_rows


def max_steps(run: Run, train_rows: PackedRows | MixedRows, global_batch_size: int) -> int:
    """Steps of the run: ``--max_steps``, or what ``--num_train_epochs`` comes to."""
    options = run.options
    if options.num_train_epochs is not None:
        return math.ceil(options.num_train_epochs * len(train_rows) / global_batch_size)
    return options.max_steps

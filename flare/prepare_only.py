"""``--prepare_only``: make the token cache of a run ahead of it, where no card and no weights are needed."""

from pathlib import Path

from flare.config import Resolved
from flare.experiment import Experiment
from flare.hub import TOKENIZER_FILES, local_model_dir, read_model_config
from flare.logs import start_logging
from flare.prepare import check_can_evaluate, check_can_train, tokenised_corpus
from flare.setup import choose_start
from flare.shapes import ModelShape


def prepare_only(resolved: Resolved) -> list[str]:
    """Make the token cache unless it is there; returns what it holds, line by line.

    Of a hub model only the tokenizer is downloaded.

    Raises: DataError where training would refuse the data, as far as that does not depend on the batch.
    """
    options = resolved.options
    start_logging()
    name, _reason = choose_start(resolved, Experiment(options.experiment_dir))
    directory = local_model_dir(name, options.cache_dir, TOKENIZER_FILES)
    config = read_model_config(directory)
    ModelShape.from_config(config, str(directory))  # refuses another family
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

"""The jobs that benchmarks/data.py measures, each in its own process: ``python -m benchmarks.data_jobs JOB ...``.

A job prints its numbers as one line of JSON.
"""

import argparse
import itertools
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BATCH_DOCUMENTS = 1000
"""Documents of a call, as ``datasets.map`` and run_clm take them."""


def paragraphs() -> list[str]:
    """Of the embedded corpus."""
    from flare.data.cache_dir import default_cache_dir
    from flare.data.sources.embedded import embedded_documents

    texts = [text for _, text in embedded_documents(default_cache_dir(None))]
    return [part for text in texts for part in text.split("\n\n") if part.strip()]


def write_corpus(path: Path, num_bytes: int, documents: int | None = None) -> int:
    """A .jsonl of documents drawn from the embedded corpus's paragraphs, each with words that no other document has.

    Every tenth word is followed by a number that no other document has, because the tokenizer caches words that
    it has seen. Returns the number of documents.

    Args:
        documents: write this number of short ones instead.
    """
    source, rng = paragraphs(), random.Random(0)
    sentences = [line for part in source for line in part.split(". ") if 40 < len(line) < 160]
    size = count = 0
    with open(path, "w", encoding="utf-8") as file:
        while count < documents if documents else size < num_bytes:
            if documents:
                text = f"{rng.choice(sentences)} {count}"
            else:
                words = " ".join(rng.choices(source, k=rng.randint(5, 25))).split(" ")
                words[::10] = [f"{word}{rng.randrange(10**6)}" for word in words[::10]]
                text = " ".join(words)
            size += file.write(json.dumps({"text": text}) + "\n")
            count += 1
    return count


def train_tokenizer(path: Path, vocab_size: int) -> int:
    """A byte-level BPE as Qwen's, from the source of the standard library; returns its vocabulary size."""
    import sysconfig

    from tokenizers.trainers import BpeTrainer
    from transformers import Qwen2Tokenizer

    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in files)
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(vocab_size=vocab_size, min_frequency=1, show_progress=False, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))
    return backend.get_vocab_size()


def texts_of(corpus: Path) -> Iterator[list[str]]:
    """The corpus by batches of documents."""
    with open(corpus, "rb") as file:
        while lines := list(itertools.islice(file, BATCH_DOCUMENTS)):
            yield [json.loads(line)["text"] for line in lines]


def encode_batch(corpus: Path, tokenizer: Path, _work: Path) -> dict:
    """``tokenizers``' own encode_batch on all cores; reading and parsing are not counted."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer))
    tokens = seconds = 0.0
    for texts in texts_of(corpus):
        t0 = time.perf_counter()
        tokens += sum(len(encoding) for encoding in backend.encode_batch(texts, add_special_tokens=False))
        seconds += time.perf_counter() - t0
    return {"tokens": tokens, "seconds": seconds}


def encode_batch_huge_pages(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """The same, started as Flare starts its workers (``flare.child_process.HUGE_PAGES``)."""
    return encode_batch(corpus, tokenizer, work)


def flare(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """From the file to packed rows: fingerprint, parse, check, tokenise, write, split, pack."""
    cache, seconds = open_rows(corpus, tokenizer, work)
    return {"tokens": cache.meta["num_tokens"], "seconds": seconds}


def open_rows(corpus: Path, tokenizer: Path, work: Path) -> tuple:
    """(token cache, seconds until its rows can be read)."""
    from flare.data.packing import PackedRows
    from flare.data.sources.base import SourceSpec
    from flare.data.sources.open import open_source
    from flare.data.token_cache.build import build_token_cache
    from flare.data.token_cache.cache import TokenSettings
    from flare.data.validation_split import split_documents

    loaded = fast_tokenizer(tokenizer)
    t0 = time.perf_counter()
    source = open_source(SourceSpec(str(corpus)), work)
    cache = build_token_cache(source, loaded, work, TokenSettings())
    PackedRows(cache, split_documents(cache.hashes, 0.1)[0], 4096, "document")
    return cache, time.perf_counter() - t0


def fast_tokenizer(path: Path) -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|endoftext|>")


def run_clm(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """transformers' run_clm.py: map(tokenize) and map(group_texts) with as many processes as cores.

    Source: examples/pytorch/language-modeling/run_clm.py. Reading the file into Arrow is not counted.
    """
    import datasets

    datasets.disable_progress_bars()
    loaded = fast_tokenizer(tokenizer)
    raw = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(work))
    block_size, workers = 4096, len(os.sched_getaffinity(0))

    def tokenize_function(examples: dict) -> dict:
        return loaded(examples["text"])

    def group_texts(examples: dict) -> dict:
        joined = {k: list(itertools.chain(*examples[k])) for k in examples}
        total = len(joined[next(iter(examples))]) // block_size * block_size
        result = {k: [t[i : i + block_size] for i in range(0, total, block_size)] for k, t in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    t0 = time.perf_counter()
    tokenized = raw.map(tokenize_function, batched=True, num_proc=workers, remove_columns=raw.column_names)
    tokenized.map(group_texts, batched=True, num_proc=workers)
    seconds = time.perf_counter() - t0
    return {"tokens": sum(map(len, tokenized.with_format("arrow")["input_ids"].combine_chunks())), "seconds": seconds}


def streaming(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """From the file to packed rows that are read, without a token cache: one epoch, all cores, blocks of 1,024 rows.

    ``window_bytes``: the most bytes of tokens on disk, checked once per step.
    """
    import torch

    from flare.data.sources.base import SourceSpec
    from flare.data.sources.open import open_source
    from flare.data.streaming.held_out import open_streamed
    from flare.data.streaming.rows import StreamedRows, StreamSettings
    from flare.data.token_cache.cache import TokenSettings
    from flare.distributed.process_group import World

    loaded, step, window = fast_tokenizer(tokenizer), 32, 0
    settings = StreamSettings(4096, "document", 0, 1024, work, len(os.sched_getaffinity(0)))
    t0 = time.perf_counter()
    found = open_streamed(open_source(SourceSpec(str(corpus)), work), loaded, work, TokenSettings(), 0.1)
    rows, position = StreamedRows(found, settings), 0
    rows.start(World(0, 0, 1, torch.device("cpu")), None, step)
    while rows.rows(position, position + 1) is not None and rows.blocks[0].block.place.epoch == 0:
        rows.batch(rows.rows(position, position + step))
        position += step
        window = max(window, sum(file.stat().st_size for file in rows.source.directory.glob("*/tokens.bin")))
    seconds = time.perf_counter() - t0
    rows.close()
    return {"tokens": position * settings.seq_len, "seconds": seconds, "window_bytes": window}


def cached_start(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """Seconds from a corpus with an existing token cache to rows: fingerprint, open, split, pack."""
    cache, seconds = open_rows(corpus, tokenizer, work)
    return {"seconds": seconds, "documents": cache.meta["num_documents"]}


def read_rows(corpus: Path, tokenizer: Path, work: Path) -> dict:
    """Rows/s of one process that reads packed rows in training order, rows as long as the demo's."""
    from flare.data.order import RowOrder
    from flare.data.packing import PackedRows
    from flare.data.validation_split import split_documents

    cache, _ = open_rows(corpus, tokenizer, work)
    seq_len, batch = 256, 8
    rows = PackedRows(cache, split_documents(cache.hashes, 0.1)[0], seq_len, "document")
    order = RowOrder(0, len(rows))
    order.rows(0, 1)
    t0, position = time.perf_counter(), 0
    while (seconds := time.perf_counter() - t0) < 3:
        rows.batch(order.rows(position, position + batch))
        position += batch
    return {"rows": position, "tokens": position * seq_len, "seconds": seconds}


JOBS = {
    job.__name__: job
    for job in (encode_batch, encode_batch_huge_pages, flare, streaming, run_clm, cached_start, read_rows)
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("job", choices=[*JOBS, "idle"])
    parser.add_argument("paths", nargs=3, type=Path, metavar="PATH", help="corpus, tokenizer.json, work directory")
    args = parser.parse_args(argv)
    if args.job == "idle":  # the interpreter with what Flare's job imports, and no work
        fast_tokenizer(args.paths[1])
        result = {}
    else:
        result = JOBS[args.job](*args.paths)
    result["max_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

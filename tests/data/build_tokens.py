"""A process that builds a token cache, for tests that kill it: CORPUS BASE CACHE_DIR WORKERS. No torch."""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from flare.data.sources.base import Piece, Source
from flare.data.sources.file_formats import WholeFile
from flare.data.token_cache.build import build_token_cache
from flare.data.token_cache.cache import TokenSettings
from flare.errors import run_script
from flare.logs import start_logging


class FileByFile(Source):
    """One piece per file of a folder, also for small files."""

    def __init__(self, directory: Path) -> None:
        self.files = sorted(directory.glob("*.jsonl"))

    def fingerprint(self) -> str:
        return ",".join(file.name for file in self.files)

    def pieces(self) -> list[Piece]:
        return [WholeFile(file, ".jsonl", "text") for file in self.files]


def main() -> int:
    corpus, base, cache_dir = map(Path, sys.argv[1:4])
    start_logging()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    build_token_cache(FileByFile(corpus), tokenizer, cache_dir, TokenSettings(None, 0.1, int(sys.argv[4])))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))

"""Progress of tokenising: a bar with tokens/s on a terminal, else a log line every 30 seconds."""

import sys
import time
from collections.abc import Iterable

from tqdm import tqdm

from flare.logs import log
from flare.terminal import columns

LOG_EVERY_SEC = 30.0


class TokenProgress:
    """Number of tokens, and the finished fraction of the text. In an unfinished piece, a character counts as one byte.

    Args:
        sizes: estimated bytes of text of each piece.
        done: indices of the pieces that are already finished.
    """

    def __init__(self, sizes: list[int], done: Iterable[int]) -> None:
        self.sizes = sizes
        self.total = max(sum(sizes), 1)
        self.done = sum(sizes[index] for index in done)
        self.open: dict[int, int] = {}
        self.tokens = 0
        self.t0 = self.logged = time.monotonic()
        self.bar: tqdm | None = None

    def __enter__(self) -> "TokenProgress":
        if sys.stderr.isatty():
            form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm(total=1.0, desc="tokenising", leave=False, bar_format=form, ncols=columns(sys.stderr))
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def report(self, index: int, tokens: int, characters: int) -> None:
        """Add tokens and characters of an unfinished piece."""
        self.tokens += tokens
        self.open[index] = self.open.get(index, 0) + characters
        self._show()

    def finish(self, index: int) -> None:
        """Mark a piece as finished."""
        self.open.pop(index, None)
        self.done += self.sizes[index]
        self._show()

    @property
    def share(self) -> float:
        """The finished fraction of the corpus, 0 to 1."""
        begun = sum(min(characters, self.sizes[index]) for index, characters in self.open.items())
        return (self.done + begun) / self.total

    def _show(self) -> None:
        rate = self.tokens / max(time.monotonic() - self.t0, 1e-9)
        if self.bar is not None:
            self.bar.update(self.share - self.bar.n)
            self.bar.set_postfix_str(f"{self.tokens:,} tokens, {rate:,.0f} tokens/s")
        elif time.monotonic() - self.logged >= LOG_EVERY_SEC:
            self.logged = time.monotonic()
            log.info(f"tokenising: {self.share:.0%} of the data, {self.tokens:,} tokens, {rate:,.0f} tokens/s")

"""Windows over documents: which tokens are input and which are scored. Pure functions.

A document of n tokens is the sequence ``[prefix, t0, ..., t(n-1)]`` of n + 1 entries; a window is a
slice of it. Each token is scored in exactly one window.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """``sequence[start:stop-1]`` goes in, ``sequence[first_target:stop]`` is scored."""

    document: int
    start: int
    first_target: int
    stop: int

    @property
    def input_length(self) -> int:
        """Number of input tokens."""
        return self.stop - 1 - self.start

    def inputs(self, sequence: list[int]) -> list[int]:
        """Input token ids: (input_length,)."""
        return sequence[self.start : self.stop - 1]

    def labels(self, sequence: list[int], ignore_index: int) -> list[int]:
        """Target of every input position, ``ignore_index`` if an earlier window scores it: (input_length,)."""
        already_scored = self.first_target - 1 - self.start
        return [ignore_index] * already_scored + sequence[self.first_target : self.stop]


def document_windows(document: int, num_tokens: int, max_length: int, stride: int | None = None) -> list[Window]:
    """Windows over a document that score each token once.

    Without a stride, windows are disjoint: ``max_length`` targets with one token of context (the prefix, or the last
    token of the previous window). The last window is extended to the left with tokens that were already scored, so
    that it also has ``max_length`` input tokens.

    With a stride, windows after the first score ``stride`` targets and have ``max_length`` input tokens, so each
    target has at least ``max_length - stride + 1`` tokens of context.

    Source: lm-eval, ``make_disjoint_window(get_rolling_token_windows(..., context_len=1))``; HF's guide "Perplexity
    of fixed-length models", with the same windows (its token counts are one too low in each window after the first).
    """
    step = stride or max_length
    windows, scored = [], 0
    while scored < num_tokens:
        stop = min(scored + (step if scored else max_length), num_tokens) + 1
        start = max(0, stop - 1 - max_length)
        windows.append(Window(document, start, scored + 1, stop))
        scored = stop - 1
    return windows


def tail_window(document: int, num_tokens: int, context_length: int, num_targets: int) -> Window:
    """A window that scores the last ``num_targets`` tokens of a document with ``context_length`` input tokens.

    The document must have at least ``context_length`` tokens.
    """
    stop = num_tokens + 1
    return Window(document, stop - 1 - context_length, stop - num_targets, stop)

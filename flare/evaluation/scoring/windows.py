"""Which tokens the model sees when it predicts which. Pure functions.

A document of n tokens is the sequence ``[prefix, t0, ..., t(n-1)]`` of n + 1 entries; a window is a
slice of it. What a window predicts is counted once, over all windows of the document.
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
        """Tokens that the model sees."""
        return self.stop - 1 - self.start

    def inputs(self, sequence: list[int]) -> list[int]:
        """Token ids that the model sees: (input_length,)."""
        return sequence[self.start : self.stop - 1]

    def labels(self, sequence: list[int], ignore_index: int) -> list[int]:
        """Target of every input position, ``ignore_index`` where it was scored before: (input_length,)."""
        seen_before = self.first_target - 1 - self.start
        return [ignore_index] * seen_before + sequence[self.first_target : self.stop]


def document_windows(document: int, num_tokens: int, max_length: int, stride: int | None = None) -> list[Window]:
    """Windows over a document, each token a target once.

    Without a stride they are disjoint: ``max_length`` targets with one token of context each. The first window's
    context is the prefix, a later one's the last token of the window before. The last window is filled to the left
    with tokens that were scored before, so that it sees ``max_length`` tokens as well. No tokens, no windows.

    With a stride, windows after the first score ``stride`` targets and see ``max_length`` tokens: at least
    ``max_length - stride + 1`` of them stand before a target.

    Source: lm-eval, ``make_disjoint_window(get_rolling_token_windows(..., context_len=1))``; HF's guide "Perplexity
    of fixed-length models", whose windows these are (its counts are one too low in each window after the first).
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
    """The last ``num_targets`` tokens of a document, when the model sees ``context_length`` tokens.

    The document must hold at least ``context_length`` tokens.
    """
    stop = num_tokens + 1
    return Window(document, stop - 1 - context_length, stop - num_targets, stop)

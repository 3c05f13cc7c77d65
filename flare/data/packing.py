"""Pack the documents of a split into rows of ``seq_len`` tokens without padding.

The documents of each split form one stream of tokens. Row r has tokens [r*T, r*T + T) of the stream as inputs, and the
same tokens shifted by one as labels, so every token is a target once. With ``document`` packing, attention and
positions restart at each document. The first token of a document is not a target, because nothing predicts it.
"""

import numpy as np

from flare.data.order import RowOrder
from flare.data.token_cache.cache import TokenCache
from flare.data.training_rows import IGNORE_INDEX, Batch, TrainRows


class PackedRows(TrainRows):
    """Packed rows of the training or the held-out documents.

    Args:
        cache: the tokens. documents: indices of the documents, ascending.
        seq_len: tokens of a row (T). packing: ``document`` or ``concat``.
        keep_last: keep a last row that is not full (for evaluation; the missing tokens are not targets).
    """

    def __init__(
        self, cache: TokenCache, documents: np.ndarray, seq_len: int, packing: str, keep_last: bool = False
    ) -> None:
        self.cache = cache
        self.seq_len = seq_len
        self.packing = packing
        self.first = cache.offsets[documents]
        lengths = cache.offsets[documents + 1] - self.first
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.num_documents = len(documents)
        self.num_tokens = int(self.starts[-1])
        targets = max(self.num_tokens - 1, 0)
        self.num_rows = -(-targets // seq_len) if keep_last else targets // seq_len

    def __len__(self) -> int:
        return self.num_rows

    def order(self, seed: int) -> RowOrder:
        """The rows at each position of the run."""
        return RowOrder(seed, self.num_rows)

    def epochs(self, position: int) -> float:
        """Passes over the data up to a position."""
        return position / self.num_rows

    def describe(self) -> str:
        """For the log."""
        return f"{self.num_documents:,} documents, {self.num_tokens:,} tokens, {self.num_rows:,} rows"

    def passes(self, position: int) -> list[str]:
        """How often the data is read up to a position, for the log."""
        return [f"the run takes {self.epochs(position):.2f} epochs of the data"]

    def num_targets(self, rows: np.ndarray) -> int:
        """Targets in these rows, without reading them."""
        begin = np.asarray(rows, dtype=np.int64) * self.seq_len
        end = np.minimum(begin + self.seq_len, self.num_tokens - 1)
        total = int((end - begin).sum())
        if self.packing == "concat":
            return total
        inner = self.starts[1:-1]
        starts_inside = np.searchsorted(inner, end, "right") - np.searchsorted(inner, begin, "right")
        return total - int(starts_inside.sum())

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs, labels and position ids of these rows."""
        parts = [self._row(int(row)) for row in rows]
        return Batch(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))

    def _row(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        length = self.seq_len
        begin = row * length
        tokens, boundaries = self._stream(begin, min(begin + length + 1, self.num_tokens))
        missing = length + 1 - len(tokens)
        labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
        labels[: len(tokens) - 1] = tokens[1:]
        if missing:
            tokens = np.concatenate([tokens, np.full(missing, self.cache.end_of_text_id, dtype=np.int64)])
        positions = np.arange(length)
        if self.packing == "document":
            labels[boundaries - 1] = IGNORE_INDEX
            restarts = np.zeros(length, dtype=np.int64)
            restarts[boundaries[boundaries < length]] = boundaries[boundaries < length]
            positions = positions - np.maximum.accumulate(restarts)
        return tokens[:length], labels, positions

    def _stream(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [begin, end) of the stream, and the offsets in them (above 0) at which documents start."""
        first = int(np.searchsorted(self.starts, begin, "right")) - 1
        last = int(np.searchsorted(self.starts, end, "left"))
        pieces = []
        for document in range(first, last):
            low = self.first[document] + max(begin - self.starts[document], 0)
            high = self.first[document] + min(end, self.starts[document + 1]) - self.starts[document]
            pieces.append(self.cache.tokens[low:high])
        return np.concatenate(pieces).astype(np.int64), self.starts[first + 1 : last] - begin

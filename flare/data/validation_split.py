"""Which documents are held out for evaluation: decided by the hash of each document's text."""

import numpy as np

from flare.errors import DataError

SINGLE_DOCUMENT = (
    "the data holds a single document (or copies of one); two are needed to hold one out (a .txt is one document, "
    "whatever its lines; a .jsonl has one per line)"
)


def split_documents(hashes: np.ndarray, percentage: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) document indices, by document hash: stable when the data grows.

    Each split gets at least one document (validation gets the one with the lowest hash).

    Raises: DataError if there are fewer than two different documents.
    """
    held_out = hashes < np.uint64(min(percentage / 100 * 2**64, 2**64 - 1))
    if not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all():
        held_out = hashes == hashes.min()
    if held_out.all():
        raise DataError(SINGLE_DOCUMENT)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)

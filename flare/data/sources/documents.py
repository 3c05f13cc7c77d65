"""Selects the rows that are usable text. Bad rows are counted, and the first ones are named."""

import hashlib
from collections.abc import Iterator

from flare.data.sources.base import BadRow, Row

REPORTED_BAD_ROWS = 5


class BadRows:
    """The number of rows without usable text, and where the first few of them are."""

    def __init__(self, count: int = 0, first: list[str] | None = None) -> None:
        self.count = count
        self.first = first or []

    def add(self, row: Row, reason: str) -> None:
        """Add one bad row."""
        self.extend(BadRows(1, [f"{row.where} {reason}"]))

    def extend(self, later: "BadRows") -> None:
        """Add bad rows that come later in the corpus."""
        self.count += later.count
        self.first = [*self.first, *later.first][:REPORTED_BAD_ROWS]


def usable_texts(rows: Iterator[Row], bad: BadRows, bad_at: list[int] | None = None) -> Iterator[str]:
    """The texts of usable rows. Bad rows are counted in ``bad``, and their indices are added to ``bad_at``."""
    for number, row in enumerate(rows):
        reason = _why_unusable(row.value)
        if reason is None:
            yield row.value
            continue
        bad.add(row, reason)
        if bad_at is not None:
            bad_at.append(number)


def _why_unusable(value: object) -> str | None:
    if isinstance(value, BadRow):
        return value.reason
    if value is None:
        return "is null"
    if is_chat(value):
        return "is a list of chat messages; convert it to one text with the model's chat template"
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "has a lone surrogate"
    return None


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, with ``role`` and ``content`` or ``from`` and ``value``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and (message.keys() & {"role", "from"}) for message in value)
    )


def text_hash(text: str) -> int:
    """A 64-bit hash of a document's text. It decides whether the document is held out for validation."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

"""What is a usable document, and its identity. Rows that are none are counted and the first ones named."""

import hashlib
from collections.abc import Iterator

from flare.data.sources.base import BadRow, Row

REPORTED_BAD_ROWS = 5


class BadRows:
    """Count of rows without usable text, and the first few with their place."""

    def __init__(self, count: int = 0, first: list[str] | None = None) -> None:
        self.count = count
        self.first = first or []

    def add(self, row: Row, reason: str) -> None:
        """Count a row."""
        self.extend(BadRows(1, [f"{row.where} {reason}"]))

    def extend(self, later: "BadRows") -> None:
        """Count what was found further on in the corpus."""
        self.count += later.count
        self.first = [*self.first, *later.first][:REPORTED_BAD_ROWS]


def usable_texts(rows: Iterator[Row], bad: BadRows, bad_at: list[int] | None = None) -> Iterator[str]:
    """The rows that hold text; the others are counted in ``bad``, and their indices added to ``bad_at``."""
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
        return "is a chat, a list of messages; write each as one text, by the model's chat template"
    if not isinstance(value, str):
        return f"is {type(value).__name__}, not text"
    if not value.strip():
        return "is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "holds a lone surrogate"
    return None


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, with ``role`` and ``content`` or ``from`` and ``value``."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and (message.keys() & {"role", "from"}) for message in value)
    )


def text_hash(text: str) -> int:
    """64 bits of a document's text, which decide the side of the split that it is on."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")

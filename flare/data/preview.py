"""Packed rows as text: a short preview for the terminal, and complete rows in a file."""

import json
from pathlib import Path

import numpy as np

SHOWN_DOCUMENTS = 6
"""Number of documents shown from the start of a row; the last one is also shown."""
SHOWN_CHARACTERS = 60
"""Number of characters shown at the start and at the end of a document."""


def row_lines(input_ids: np.ndarray, end_of_text_id: int, tokenizer: object) -> list[str]:
    """Lines that show a row of tokens (T,): one line per document, with its range of tokens in the row.

    A document ends with the end-of-text token, which is shown. The first document may start in the previous row,
    and the last one may continue in the next.
    """
    cuts = np.flatnonzero(input_ids == end_of_text_id) + 1
    documents = [piece for piece in np.split(input_ids, cuts) if len(piece)]
    lines = [f"first row: {len(input_ids):,} tokens, {len(documents)} documents or parts of them"]
    begin = 0
    for number, ids in enumerate(documents):
        if number < SHOWN_DOCUMENTS or number == len(documents) - 1:
            lines.append(f"  | tokens {begin}-{begin + len(ids) - 1}: {shortened(tokenizer.decode(ids))}")
        elif number == SHOWN_DOCUMENTS:
            lines.append(f"  | ... {len(documents) - SHOWN_DOCUMENTS - 1} more")
        begin += len(ids)
    return lines


def shortened(text: str) -> str:
    """A text on one line: control characters are escaped, and the middle of a long text is left out."""
    if len(text) > 2 * SHOWN_CHARACTERS + 5:
        text = f"{text[:SHOWN_CHARACTERS]} ... {text[-SHOWN_CHARACTERS:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def write_rows(path: Path, rows: np.ndarray, input_ids: np.ndarray, tokenizer: object) -> None:
    """Write rows (N,) with tokens (N, T) as JSON lines: index, token ids, text."""
    with open(path, "w", encoding="utf-8") as file:
        for row, ids in zip(rows.tolist(), input_ids, strict=True):
            record = {"row": row, "input_ids": ids.tolist(), "text": tokenizer.decode(ids)}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

"""Reads records that may span several lines: elements of a JSON array, rows of a CSV file.

Both are read as a stream: only one record and one block of the file are in memory.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from flare.data.sources.base import BadRow, missing_column
from flare.errors import ConfigError, DataError

BLOCK_CHARACTERS = 2**20
SPACE = re.compile(r"[ \t\r\n]*")
UNDECODED = re.compile("[\udc80-\udcff]")
"""Bytes that are not UTF-8, as ``errors="surrogateescape"`` decodes them."""
CUT_CHARACTERS = 20
"""If the end of a block cuts a value outside a string, the parse error is at most this far from the end."""


def array_elements(text: TextIO, block: int = BLOCK_CHARACTERS) -> Iterator[object]:
    """The elements of a JSON array, in order.

    Raises: ValueError when the text is not a JSON array.
    """
    decode = json.JSONDecoder().raw_decode
    buffer = text.read(block)
    at = SPACE.match(buffer).end() + 1  # after the bracket
    is_first = True
    while True:
        at = SPACE.match(buffer, at).end()
        if is_first and buffer[at : at + 1] == "]":
            end = at
            break
        try:
            value, end = decode(buffer, at)
            end = SPACE.match(buffer, end).end()
            if buffer[end : end + 1] not in (
                ",",
                "]",
            ):  # or the block ends here, and a number may continue in the next block
                raise json.JSONDecodeError("Expecting ',' delimiter", buffer, end)
        except json.JSONDecodeError as error:
            is_cut = error.pos + CUT_CHARACTERS >= len(buffer) or error.msg.startswith("Unterminated string")
            if not is_cut or not (more := text.read(max(block, len(buffer) - at))):
                raise
            buffer, at = buffer[at:] + more, 0
            continue
        yield value
        is_first = False
        if buffer[end] == "]":
            break
        at = end + 1
    if buffer[end + 1 :].strip() or any(map(str.strip, iter(lambda: text.read(block), ""))):
        raise json.JSONDecodeError("Extra data", buffer, end)


def csv_values(text: TextIO, file: Path, column: str) -> Iterator[tuple[int, object]]:
    """(first line, value of the column) of each row after the header.

    A row with more or fewer fields than the header is bad, because an unquoted comma has cut its text. After a quote
    that is not closed, every line to the end of the file is bad.

    Raises: ConfigError when the header does not have the column; DataError when it is not UTF-8; csv.Error.
    """
    lines: list[str] = []  # of the current row
    reader = csv.reader(_remembered(text, lines))
    header = next(reader, [])
    if column not in header:
        raise _wrong_header(header, file, column)
    place = header.index(column)
    lines.clear()
    begin, held, held_lines = (
        reader.line_num + 1,
        None,
        [],
    )  # a row is yielded after the next one is read, because the last row may have an open quote
    for fields in reader:
        if held is not None:
            yield held
        is_complete = len(fields) == len(header)
        value = fields[place] if is_complete else BadRow(f"has {len(fields)} fields, the header has {len(header)}")
        held, held_lines = ((begin, value), lines.copy()) if fields else (None, [])
        begin = reader.line_num + 1
        lines.clear()
    if held is not None and _is_cut(held_lines):
        yield held[0], BadRow("is cut off (a quote is not closed)")
        for line in range(held[0] + 1, held[0] + len(held_lines)):  # each may have been a row
            yield line, BadRow(f"is inside the quote of line {held[0]}, which is not closed")
    elif held is not None:
        yield held


def _wrong_header(header: list[str], file: Path, column: str) -> ConfigError | DataError:
    """The error for a header without the column, with the probable reason."""
    if UNDECODED.search("".join(header)):
        return DataError(f"{file} has a header that is not UTF-8; convert the file to UTF-8")
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        return ConfigError(f"{file} separates its columns with {other!r}; a .csv file needs commas")
    return missing_column(column, file, header)


def _remembered(text: TextIO, lines: list[str]) -> Iterator[str]:
    for line in text:
        lines.append(line)
        yield line


def _is_cut(lines: list[str]) -> bool:
    """Whether the text ends within quotes."""
    try:
        list(csv.reader(lines, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False

"""Records of the formats that are not one a line: elements of a JSON array, rows of a CSV file.

Both are read as a stream: of a file of many gigabytes one record lies in memory, and a block of the file.
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
"""Bytes that are no UTF-8, as ``errors="surrogateescape"`` reads them."""
CUT_CHARACTERS = 20
"""A value that the end of a block cuts fails to parse this near to the end, unless it is within a string."""


def array_elements(text: TextIO, block: int = BLOCK_CHARACTERS) -> Iterator[object]:
    """The elements of a JSON array, in order.

    Raises: ValueError where the text is no JSON array.
    """
    decode = json.JSONDecoder().raw_decode
    buffer = text.read(block)
    at = SPACE.match(buffer).end() + 1  # behind the bracket
    is_first = True
    while True:
        at = SPACE.match(buffer, at).end()
        if is_first and buffer[at : at + 1] == "]":
            end = at
            break
        try:
            value, end = decode(buffer, at)
            end = SPACE.match(buffer, end).end()
            if buffer[end : end + 1] not in (",", "]"):  # or the block ends here: a number may go on in the next one
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
    """(first line, value of the column) of each row below the header.

    A row with more or fewer fields than the header is bad: a comma that is not quoted has cut its text. Where a
    quote is not closed, every line to the end of the file is bad.

    Raises: ConfigError when the header has no such column; DataError when it is no UTF-8; csv.Error.
    """
    lines: list[str] = []  # of the row in hand
    reader = csv.reader(_remembered(text, lines))
    header = next(reader, [])
    if column not in header:
        raise _wrong_header(header, file, column)
    place = header.index(column)
    lines.clear()
    begin, held, held_lines = reader.line_num + 1, None, []  # a row is held back till it is known to be the last
    for fields in reader:
        if held is not None:
            yield held
        is_whole = len(fields) == len(header)
        value = fields[place] if is_whole else BadRow(f"has {len(fields)} fields, the header {len(header)}")
        held, held_lines = ((begin, value), lines.copy()) if fields else (None, [])
        begin = reader.line_num + 1
        lines.clear()
    if held is not None and _is_cut(held_lines):
        yield held[0], BadRow("is cut off (a quote is not closed)")
        for line in range(held[0] + 1, held[0] + len(held_lines)):  # each may be a row that the quote has swallowed
            yield line, BadRow(f"is within the quote of line {held[0]}, which is not closed")
    elif held is not None:
        yield held


def _wrong_header(header: list[str], file: Path, column: str) -> ConfigError | DataError:
    """Why a header has no such column."""
    if UNDECODED.search("".join(header)):
        return DataError(f"{file} is not UTF-8, as its header shows; convert it")
    other = next((mark for mark in ";\t|" if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        return ConfigError(f"{file} parts its columns by {other!r}; a .csv needs commas")
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

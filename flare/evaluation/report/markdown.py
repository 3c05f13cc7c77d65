"""GitHub's Markdown: tables and cells that hold any text."""


def table(header: tuple, rows: list[tuple]) -> str:
    """A table; every column but the first is aligned to the right when there are more than two."""
    align = ["---"] + ["---" if len(header) == 2 else "---:"] * (len(header) - 1)
    lines = [header, tuple(align), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: object) -> str:
    """Escape text for a table cell: vertical bars, line breaks and HTML tags."""
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def quoted(text: str) -> str:
    """Any text as a code block, shown unchanged."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"

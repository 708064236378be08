"""Writing of the pages, and of parts of pages, that are made from data."""

import re
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a text, unless the file holds it already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8", newline="\n")


def with_part(page: str, start: str, end: str, part: str, what: str) -> str:
    """Returns the text of a page with this part between its marks.

    Args:
        page: The text of the page.
        start: Mark before the part.
        end: Mark after it.
        part: What stands between them, with its line breaks.
        what: What the error calls such parts, and their page: "comparisons in tiny_models.md".

    Raises:
        ValueError: The page does not have both marks, each once.
    """
    pattern = re.compile(f"{re.escape(start)}\n.*?{re.escape(end)}", re.S)
    changed, count = pattern.subn(lambda _: f"{start}\n{part}\n{end}", page)
    if count != 1:
        raise ValueError(f"there are {count} {what}, expected one: {start}, {end}")
    return changed

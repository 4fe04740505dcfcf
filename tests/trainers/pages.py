"""The programs of a page of docs/trainers."""

import pathlib
import re

PAGES = pathlib.Path(__file__).parents[2] / "docs" / "trainers"


def program_of(page):
    """Returns the Python of all code blocks of a page, one after the other."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (PAGES / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert blocks
    return "\n".join(blocks)

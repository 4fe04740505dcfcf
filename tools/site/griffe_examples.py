"""Tells Griffe that the section that our docstrings call "Example" holds doctests."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the section: Griffe shows doctests as code only below the plural."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Changes the docstring of each object, once it is read."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )

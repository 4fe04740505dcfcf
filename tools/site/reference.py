"""Writes the pages of the API reference: one for each package, with every public name in it."""

import importlib
import inspect
from typing import Any

import dpoptax
from tools.public_names import documented_names

TOP = "dpoptax"


def reference_pages() -> dict[str, str]:
    """Returns the Markdown of each page of the reference, by its path, in the order of the API."""
    names: dict[str, dict[str, Any]] = {}
    for name, value in documented_names().items():
        names.setdefault(_package(name), {})[name] = value
    order = [TOP, *(f"{TOP}.{name}" for name in dpoptax.__all__), *sorted(names)]
    packages = [name for name in dict.fromkeys(order) if name in names]
    return {f"reference/{name}.md": _page(name, names[name]) for name in packages}


def page_of(name: str) -> str:
    """Returns the path of the page that documents a public name."""
    return f"reference/{_package(name)}.md"


def _package(name: str) -> str:
    parts = name.split(".")
    # Adapters for other libraries are small packages below `compat`, with a page each.
    depth = 3 if parts[1] == "compat" else 2
    return ".".join(parts[: min(depth, len(parts) - 1)])


def _page(package: str, names: dict[str, Any]) -> str:
    doc = inspect.getdoc(importlib.import_module(package)) or ""
    if package == TOP:
        doc = doc.split("\n\n")[0] + "\n\nThese names are also attributes of `dpoptax` itself."
    lines = [f"# {package}", "", doc, "", "| name | what it is |", "|---|---|"]
    for name, value in names.items():
        lines.append(f"| [`{name.removeprefix(package + '.')}`](#{name}) | {_first_line(value)} |")
    for name in names:
        lines += ["", f"::: {name}"]
    return "\n".join(lines) + "\n"


def _first_line(value: Any) -> str:
    paragraph = (inspect.getdoc(value) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("|", "\\|")

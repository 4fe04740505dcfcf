"""Runs the tutorials, and writes a page of the documentation from each of them.

    python -m tools.tutorials                  # all of them, into docs/tutorials
    python -m tools.tutorials vae lora         # only these
    python -m tools.tutorials --out /tmp/t     # leaves docs/tutorials as it is
    python -m tools.tutorials --index          # only the list of tutorials, without running any

A tutorial is a program in tutorials/, in the percent format of Jupytext. Its first cell is
Markdown: a title, then a paragraph that says in one or two sentences what the tutorial shows. The
kernel runs in a fresh folder. An error or a Python warning fails. The text after `# %%` describes
the picture of a cell for people who cannot see it; without it, the last heading does.
"""

import argparse
import base64
import os
import pathlib
import re
import sys
import tempfile
import time
import tomllib
from typing import Any

import jupytext

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "tutorials"
PAGES = ROOT / "docs" / "tutorials"
LARGEST_PICTURE = 60_000  # bytes: pictures stay in the history of the repository
SECONDS_PER_CELL = 900  # a limit for a loaded machine; a tutorial takes less than two minutes
# Jupyter draws in the style of this file: seven inches are the width of a column of the site.
STYLE = "figure.dpi: 100\nfigure.figsize: 7, 3.6\nfigure.autolayout: True\naxes.grid: False\n"
OUTPUT = re.compile(r"\n```output\n.*?^```\n", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r"\n!\[[^\]]*\]\([a-z_]+_\d+\.png\)\n")
INDEX_HEAD = """# Tutorials

Each tutorial is a program that runs in less than two minutes on two CPU cores, with small public
data. The pages show what it printed and drew.

| tutorial | what it shows |
|---|---|
"""
INDEX_FOOT = """
Every page names its program, and says at the top what the program needs. Run it as it is, or make
a notebook for Jupyter from it:

```sh
python tutorials/own_loop.py
pip install jupytext
jupytext --to notebook tutorials/own_loop.py
```
"""


def listed() -> list[str]:
    """Returns the names of all tutorials, in the order of the site."""
    sections = tomllib.loads((ROOT / "tools" / "site" / "pages.toml").read_text())["section"]
    pages = next(section["pages"] for section in sections if section.get("title") == "Tutorials")
    return [pathlib.PurePath(page).stem for page in pages if not page.endswith("index.md")]


def existing() -> list[str]:
    """Returns the names of the tutorials that there are."""
    return [name for name in listed() if (SCRIPTS / f"{name}.py").exists()]


def read(name: str) -> Any:
    """Returns a tutorial as a notebook."""
    return jupytext.read(SCRIPTS / f"{name}.py", fmt="py:percent")


def run(notebook: Any) -> None:
    """Runs all cells in a fresh folder, and keeps their outputs in the notebook."""
    import nbclient

    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "matplotlibrc").write_text(STYLE)
        client = nbclient.NotebookClient(
            notebook,
            timeout=SECONDS_PER_CELL,
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        client.execute(env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})


def render(name: str, notebook: Any, pictures: dict[str, bytes]) -> str:
    """Returns the page of a tutorial, and puts its pictures into `pictures` by their file names.

    Raises:
        ValueError: a cell warned, or a picture is too large.
    """
    parts, heading = [], name
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source.strip() + "\n")
            heading = [heading, *re.findall(r"^#+ (.*)", cell.source, re.MULTILINE)][-1]
        elif cell.cell_type == "code":
            parts.append(f"```python\n{cell.source.strip()}\n```\n")
            text = _text(cell.get("outputs", []))
            parts += [f"```output\n{text}\n```\n"] if text else []
            for data in _drawn(cell.get("outputs", [])):
                file = f"{name}_{len(pictures) + 1}.png"
                if len(data) > LARGEST_PICTURE:
                    raise ValueError(f"{file} has {len(data)} bytes, more than {LARGEST_PICTURE}")
                pictures[file] = data
                parts.append(f"![{cell.metadata.get('title', heading)}]({file})\n")
        if position == 0:
            parts.append(f"The program is [tutorials/{name}.py](../../tutorials/{name}.py).\n")
    return "\n".join(parts)


def without_outputs(page: str) -> str:
    """Returns the page as it was before its cells ran."""
    return PICTURE.sub("", OUTPUT.sub("", page))


def index() -> str:
    """Returns the page that lists the tutorials."""
    rows = []
    for name in existing():
        title, text = read(name).cells[0].source.split("\n\n")[:2]
        rows.append(f"| [{title.removeprefix('# ')}]({name}.md) | {' '.join(text.split())} |\n")
    return INDEX_HEAD + "".join(rows) + INDEX_FOOT


def _text(outputs: list[Any]) -> str:
    """Returns what a cell printed to stdout. Progress bars are on stderr."""
    texts = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            lines = output.text.splitlines()
            # tqdm, which NumPyro imports, asks for a widget that no page needs.
            warnings = [line for line in lines if re.search("(?<!Tqdm)Warning", line)]
            if warnings:
                raise ValueError("a cell warns: " + warnings[0])
        elif output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "execute_result" and "image/png" not in output.data:
            texts.append(output.data["text/plain"] + "\n")
    return "".join(texts).strip("\n")


def _drawn(outputs: list[Any]) -> list[bytes]:
    return [
        base64.b64decode(output.data["image/png"])
        for output in outputs
        if "image/png" in output.get("data", {})
    ]


def main() -> None:
    """Runs the tutorials that the command line names, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of tutorials; default: all")
    parser.add_argument("--out", type=pathlib.Path, default=PAGES, help="folder of the pages")
    parser.add_argument("--index", action="store_true", help="only write the list of tutorials")
    options = parser.parse_args()
    unknown = set(options.names) - set(existing())
    if unknown:
        parser.error(f"no tutorial has the name {unknown.pop()}; there are {', '.join(existing())}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [] if options.index else options.names or existing():
        start, used = time.monotonic(), _child_seconds()
        notebook, pictures = read(name), {}
        run(notebook)
        page = render(name, notebook, pictures)
        for old in options.out.glob(f"{name}_[0-9]*.png"):
            old.unlink()
        (options.out / f"{name}.md").write_text(page)
        for file, data in pictures.items():
            (options.out / file).write_bytes(data)
        spent = f"{time.monotonic() - start:.0f} s, {_child_seconds() - used:.0f} CPU seconds"
        print(f"{name}: {spent}, {len(pictures)} pictures", flush=True)
    (options.out / "index.md").write_text(index())


def _child_seconds() -> float:
    used = os.times()
    return used.children_user + used.children_system


if __name__ == "__main__":
    sys.exit(main())

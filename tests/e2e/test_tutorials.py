"""Each page of a tutorial has the cells of its program, and an error or a warning fails its run."""

import base64
import re

import jupytext
import nbformat.v4 as notebooks
import pytest

from tools import tutorials

PROGRAM = """# %% [markdown]
# # A title
#
# What it shows.

# %% The drawing
print("printed")
"""
EXISTING = tutorials.existing()


def make_page(*outputs, pictures=None):
    """Returns the page of `PROGRAM`, as if its cell had these outputs."""
    notebook = jupytext.reads(PROGRAM, fmt="py:percent")
    notebook.cells[-1].outputs = list(outputs)
    return tutorials.render("name", notebook, {} if pictures is None else pictures)


@pytest.mark.parametrize("name", EXISTING)
def test_a_page_has_the_cells_of_its_program_and_its_pictures(name):
    page = (tutorials.PAGES / f"{name}.md").read_text()
    remedy = f"tutorials/{name}.py has changed: run `make tutorials ARGS={name}`"
    assert tutorials.without_outputs(page) == tutorials.render(name, tutorials.read(name), {}), (
        remedy
    )
    assert page != tutorials.without_outputs(page)
    files = {path.name: path for path in tutorials.PAGES.glob(f"{name}_[0-9]*.png")}
    assert set(re.findall(r"\]\(([a-z_]+_\d+\.png)\)", page)) == set(files)
    assert all(path.stat().st_size <= tutorials.LARGEST_PICTURE for path in files.values())


def test_every_tutorial_is_listed():
    remedy = "run `python -m tools.tutorials --index`"
    assert (tutorials.PAGES / "index.md").read_text() == tutorials.index(), remedy
    assert {path.stem for path in tutorials.SCRIPTS.glob("*.py")} == set(EXISTING)
    assert {path.stem for path in tutorials.PAGES.glob("*.md")} == {*EXISTING, "index"}
    assert tutorials.listed() == EXISTING


def test_a_page_shows_what_the_cells_printed_and_drew():
    picture, drawn = b"picture", {}
    page = make_page(
        notebooks.new_output("stream", name="stdout", text="printed\n"),
        notebooks.new_output("stream", name="stderr", text="100%|####|\n"),
        notebooks.new_output("stream", name="stderr", text="a.py:1: TqdmWarning: no widget"),
        notebooks.new_output("execute_result", data={"text/plain": "7"}),
        notebooks.new_output(
            "display_data", data={"image/png": base64.b64encode(picture).decode()}
        ),
        pictures=drawn,
    )
    assert drawn == {"name_1.png": picture}
    assert page.endswith("```output\nprinted\n7\n```\n\n![The drawing](name_1.png)\n")
    assert tutorials.without_outputs(page) == make_page()
    assert tutorials.without_outputs(page.replace("print(", "log(")) != make_page()


def test_a_warning_and_a_large_picture_are_refused():
    with pytest.raises(ValueError, match="FutureWarning: old"):
        make_page(notebooks.new_output("stream", name="stderr", text="a.py:1: FutureWarning: old"))
    large = base64.b64encode(bytes(tutorials.LARGEST_PICTURE + 1)).decode()
    with pytest.raises(ValueError, match=r"name_1\.png"):
        make_page(notebooks.new_output("display_data", data={"image/png": large}))


@pytest.mark.e2e
def test_programs_run_in_a_kernel_and_an_error_fails():
    notebook = jupytext.reads(PROGRAM, fmt="py:percent")
    tutorials.run(notebook)
    assert tutorials.render("name", notebook, {}).endswith("```output\nprinted\n```\n")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        tutorials.run(jupytext.reads(PROGRAM + "1 / 0\n", fmt="py:percent"))

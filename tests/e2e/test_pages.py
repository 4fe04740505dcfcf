"""The programs of the pages run as they are, and print what the pages show.

The Python blocks of a page are one program. A block of text right below one is its output, where
three dots stand for anything. Blocks with a title, such as the code of another library, do not run.
"""

import ast
import contextlib
import doctest
import io
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    "start", "epsilon", "user_level", "glossary", "faq", "pitfalls", "comparison",
    "from_opacus", "from_jax_privacy", "from_tf_privacy",
]  # fmt: skip
BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?", re.DOTALL | re.MULTILINE)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(text, folder):
    """Runs all blocks; raises where one fails or prints something else."""
    names = {"__name__": "page"}
    checker = doctest.OutputChecker()
    with contextlib.chdir(folder), jax.numpy_dtype_promotion("standard"):
        for program, expected in BLOCK.findall(text):
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                exec(compile(program, "page", "exec"), names)
            if expected:
                assert checker.check_output(expected, out.getvalue(), FLAGS), out.getvalue()


@pytest.mark.e2e
@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run_and_print_what_it_shows(page, tmp_path):
    run_page((ROOT / "docs" / f"{page}.md").read_text(), tmp_path)


def test_a_wrong_output_and_an_error_are_found(tmp_path):
    page = "```python\nprint(1 + 1)\n```\n\n```text\n{}\n```\n"
    run_page(page.format(2), tmp_path)
    with pytest.raises(AssertionError):
        run_page(page.format(3), tmp_path)
    with pytest.raises(NameError):
        run_page("```python\nmissing\n```\n", tmp_path)


def messages():
    """Returns the text of every string of the package, with three dots for what is filled in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) else "…"

    for path in (ROOT / "dpoptax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                yield text(node)


def test_every_error_of_the_questions_is_one_of_the_library():
    page = (ROOT / "docs" / "faq.md").read_text()
    known = "\n".join(messages())
    shown = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(shown) > 20
    for error in shown:
        assert error in known, error
    assert "the plan is for … apples" not in known

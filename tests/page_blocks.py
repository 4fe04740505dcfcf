"""Reads the code blocks of a markdown page, and runs them in their order in one namespace.

- Python blocks run. Lines such as `plan.epsilon()  # 0.968` are compared: a comment that starts
  with a number, True or False is the value of the expression before it, rounded as it is shown.
- In `sh` and `bash` blocks, `dpoptax ...` runs through the `main` of the command line. Other
  commands are looked up (`e2e/test_page_commands.py`).
- A `json` block is a file that its page names in a comment.
- A `text` block is what the block above it printed. Three dots stand for anything.
- A comment of HTML above a block says why it does not run or is not compared:
  `<!-- not run: the code of another library -->`, `<!-- not compared: other numbers -->`,
  `<!-- file: schema.json -->`.
"""

import ast
import contextlib
import doctest
import io
import itertools
import math
import pathlib
import re
import shlex

import attrs
import jax

from dpoptax.__main__ import main

ROOT = pathlib.Path(__file__).parents[1]
# Pages that another program writes from notebooks, with their outputs and pictures.
GENERATED = "docs/tutorials/"
LANGUAGES = ("python", "sh", "bash", "json", "text")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# A fence with what stands above it, its language, and its lines.
FENCE = re.compile(
    r"(?:<!-- (?P<kind>not run|not compared|file): (?P<note>[^>]*?) -->\n\n?)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
VALUE = re.compile(r"#\s*(True|False|-?[\d,_]*\.?\d+(?:e[+-]?\d+)?)\b")


@attrs.frozen
class Block:
    """A code block: `kind` and `note` are those of the comment above it, or None."""

    language: str
    code: str
    line: int
    kind: str | None
    note: str | None


def blocks_of(text):
    """Returns the code blocks of a page."""
    return [
        Block(
            match["language"], match["code"], text.count("\n", 0, match.start("language")) + 1,
            match["kind"], match["note"],
        )
        for match in FENCE.finditer(text)
    ]  # fmt: skip


def pages():
    """Returns every page that can hold a code block, by its path from the root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests" / "README.md"]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(found)}
    return {page: text for page, text in texts.items() if not page.startswith(GENERATED)}


def stated_values(code):
    """Yields the expressions that have their value in a comment, with it and its line."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        if isinstance(node, ast.Expr):
            match = VALUE.match(lines[node.end_lineno - 1][node.end_col_offset :].strip())
            if match:
                yield node, match[1]


def check_value(found, stated):
    """Compares with as many digits as the page shows."""
    if stated in ("True", "False"):
        assert str(found) == stated, f"{found}, where the page says {stated}"
        return
    digits, _, exponent = stated.replace(",", "").replace("_", "").partition("e")
    decimals = len(digits.partition(".")[2]) - int(exponent or 0)
    tolerance = 0.5000001 * 10**-decimals
    assert math.isclose(float(found), float(f"{digits}e{exponent or 0}"), abs_tol=tolerance), (
        f"{float(found)}, where the page says {stated}"
    )


def run_python(code, names, name):
    """Runs a block, and compares each value that it states right after its line ran."""
    tree, start = ast.parse(code), 0
    for node, stated in stated_values(code):
        before = [each for each in tree.body if start < each.end_lineno < node.lineno]
        exec(compile(ast.Module(before, []), name, "exec"), names)
        check_value(eval(compile(ast.Expression(node.value), name, "eval"), names), stated)
        start = node.end_lineno
    rest = [each for each in tree.body if each.end_lineno > start]
    exec(compile(ast.Module(rest, []), name, "exec"), names)


def commands(code):
    """Returns the commands of a shell block, without comments and with joined lines."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        # Commands that are joined by `&&` or `|` are looked at one by one.
        for joint, part in itertools.groupby(words, lambda word: word in ("&&", "|")):
            if not joint:
                found.append(list(part))
    return found


def run_block(block, names, name):
    """Runs one block that is code, or writes the file that it is."""
    if block.language == "python":
        # Blank lines keep the line numbers of the page in a traceback.
        run_python("\n" * block.line + block.code, names, name)
    elif block.kind == "file":
        pathlib.Path(block.note).write_text(block.code)
    elif block.language in ("sh", "bash"):
        for words in commands(block.code):
            if words[0] == "dpoptax":
                errors = io.StringIO()
                with contextlib.redirect_stderr(errors):
                    status = main(words[1:])
                assert status == 0, f"{words}: exit status {status}\n{errors.getvalue()}"


def run_page(text, folder, setup=dict, name="page"):
    """Runs all blocks of a page in a folder; raises where one fails or prints something else.

    Args:
        text: the page.
        folder: where files are read and written.
        setup: returns what the page takes for given, by its name.
        name: of the page, for errors.

    Returns:
        The names that its programs defined.
    """
    out = io.StringIO()
    with contextlib.chdir(folder), jax.numpy_dtype_promotion("standard"):
        names = {"__name__": "page", **setup()}
        for block in blocks_of(text):
            if block.kind in ("not run", "not compared"):
                continue
            if block.language == "text":
                where = f"{name}, line {block.line}; the program printed:\n{out.getvalue()}"
                checker = doctest.OutputChecker()
                assert checker.check_output(block.code, out.getvalue(), FLAGS), where
            else:
                out = io.StringIO()
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
                    run_block(block, names, name)
    return names

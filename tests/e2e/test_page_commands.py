"""Commands that the pages show exist, with their options, and draw the pictures beside them."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
import tomllib
import warnings

import page_blocks
import pytest

from dpoptax.__main__ import main

ROOT = page_blocks.ROOT
PAGES = {
    page: text for page, text in page_blocks.pages().items() if page.startswith(("docs/", "README"))
} | {page: page_blocks.pages()[page] for page in ("ARCHITECTURE.md", "CONTRIBUTING.md")}
COMMAND = re.compile(r"`((?:\S*python|make|dpoptax|pip)(?: [^`\n]+)?)`")
# How a sentence says that its command draws all figures.
ALL = r"(?:figures? of this page|writes this page)"
DRAWS = re.compile(
    r"make (bench|leaderboard|reproduce)|dpoptax report|\S*python (-m \w|tools/|examples/)"
)
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def commands_of(text):
    """Yields the words of each command in a block or in a sentence."""
    for block in page_blocks.blocks_of(text):
        if block.language in ("sh", "bash"):
            yield from page_blocks.commands(block.code)
    for command in COMMAND.findall(
        re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    ):
        yield shlex.split(command)


def refuse_unknown(words):
    """Raises AssertionError if a command, its target, its file or one of its options is missing."""
    program, *rest = words
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        for target in targets:
            rule = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n?)*)", MAKEFILE, re.MULTILINE)
            assert rule, f"no target {target}"
            for word in rest:
                if word.startswith("ARGS="):
                    recipe = rule[1].split("$(ARGS)")[0].split()
                    python = [place for place, part in enumerate(recipe) if "python" in part]
                    if python:
                        refuse_unknown(["python", *recipe[python[-1] + 1 :], *word[5:].split()])
    elif program == "pip":
        assert rest[:1] in ([], ["install"])
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(EXTRAS), f"no extra in {extras}"
    elif program == "dpoptax":
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert not options(rest) - options_of("dpoptax", *rest[:1]), rest
    elif rest[:1] == ["-m"] and rest[1] != "pytest":
        assert (ROOT / rest[1].split(".")[0]).is_dir(), f"no module {rest[1]}"
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
        if options(rest):
            assert not options(rest) - options_of("-m", rest[1]), rest
    elif rest and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), f"no file {rest[0]}"
        if options(rest):
            assert not options(rest) - options_of(rest[0]), rest


def options(words):
    return {word.split("=")[0] for word in words if word.startswith("--")}


@functools.cache
def options_of(program, *arguments):
    """Returns the options that the help of a program lists; it runs in this process."""
    out, module = io.StringIO(), program == "-m"
    run = functools.partial(runpy.run_module if module else runpy.run_path, run_name="__main__")
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", "--help"])
        if program == "dpoptax":
            with pytest.raises(SystemExit):
                main([*arguments, "--help"])
        else:
            patch.syspath_prepend((ROOT / program).parent)
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            with pytest.raises(SystemExit):
                run(arguments[0] if module else str(ROOT / program))
    return set(re.findall(r"--[\w-]+", out.getvalue()))


@pytest.mark.parametrize("page", sorted(PAGES))
def test_the_commands_of_a_page_exist_with_their_options(page):
    for words in commands_of(PAGES[page]):
        refuse_unknown(words)


def test_commands_that_do_not_exist_are_found():
    wrong = (
        "make missing", 'make bench ARGS="--missing"', "pip install 'dpoptax[missing]'",
        "python -m missing", "python -m benchmarks.layers --missing", "python missing.py",
        "python examples/05_vae.py --missing 1", "dpoptax epsilon --missing 1",
    )  # fmt: skip
    for command in wrong:
        with pytest.raises(AssertionError):
            refuse_unknown(shlex.split(command))


def pictures():
    """Yields each page with each of its pictures, and where in the page it stands."""
    for page, text in PAGES.items():
        for match in re.finditer(r"!\[[^\]]*\]\(([^)]+)\)", text):
            yield page, (ROOT / page).parent.joinpath(match[1]).resolve(), match.start()


def commands_beside(page, place):
    """Returns the commands in the section of a picture, and those for all figures of the page."""
    text = PAGES[page]
    start, end = text.rfind("\n## ", 0, place) + 1, text.find("\n## ", place)
    whole = re.findall(rf"{ALL}[^.]*?`[^`]+`|`[^`]+`[^.]*?{ALL}", text)
    return [
        " ".join(words)
        for part in (text[start : None if end < 0 else end], *whole)
        for words in commands_of(part)
    ]


def test_each_picture_of_a_page_has_the_command_that_draws_it_beside_it():
    missing = []
    for page, picture, place in pictures():
        assert picture.is_file(), f"{page}: {picture}"
        if not any(DRAWS.match(command) for command in commands_beside(page, place)):
            missing.append(f"{page}: {picture.name}")
    assert not missing, "write the command that draws a picture beside it"


def test_every_picture_of_the_docs_is_shown_on_a_page():
    shown = {picture for _, picture, _ in pictures()}
    paths = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")]
    found = {
        path.resolve()
        for path in paths
        if not path.relative_to(ROOT).as_posix().startswith(page_blocks.GENERATED)
    }
    assert found - shown == set()

"""The programs of the pages run as they are, and print what the pages show; quoted errors exist.

`page_blocks.py` says how a page is written, and `page_setups.py` what it takes for given. A page
that is in no table below runs in the tier of end-to-end tests, so a new page needs no line here.
"""

import ast
import pathlib
import re

import page_blocks
import page_setups
import pytest
from eight_devices import run_on_eight_devices

PAGES = page_blocks.pages()
WITH_BLOCKS = {page: text for page, text in PAGES.items() if page_blocks.blocks_of(text)}
# Less than a second each, or many minutes.
QUICK = {
    "docs/clipping.md", "docs/epsilon.md", "docs/from_d3p.md", "docs/randomness.md",
}  # fmt: skip
NIGHTLY = {
    "docs/adoption.md", "docs/correlated_noise.md", "docs/is_it_private.md", "docs/scaling.md",
    "docs/trainers/lora.md",
}  # fmt: skip
# Tests that run the Python of a page with fewer steps, in another environment, or check results.
ELSEWHERE = {
    "README.md": "e2e/test_readme.py",
    "docs/augmentation.md": "e2e/test_readme.py",
    "docs/extending.md": "laws/test_extending_page.py",
    "docs/private_posteriors.md": "vi/test_private_posteriors_page.py",
    "docs/synthetic_data.md": "synthetic/test_synthesize.py",
    "docs/trainers/jax_privacy.md": "trainers/test_jax_privacy.py",
    "docs/trainers/keras.md": "trainers/test_keras.py",
    "docs/trainers/nnx.md": "trainers/test_nnx.py",
    "docs/trainers/optax.md": "trainers/test_nnx.py",
    "docs/trainers/tunix.md": "trainers/test_tunix.py",
    "docs/trust_intervals.md": "vi/test_trust_page.py",
    "docs/variational_inference.md": "vi/numpyro/test_page.py",
}
ON_EIGHT_DEVICES = {"docs/large_models.md"}
# Blocks that no test runs or compares, with the reason that the page states.
LEFT_OUT = {
    "ARCHITECTURE.md": 2,
    "docs/command_line.md": 1,
    "docs/from_jax_privacy.md": 1,
    "docs/from_opacus.md": 3,
    "docs/from_tf_privacy.md": 2,
    "docs/is_it_private.md": 2,
    "docs/scaling.md": 1,
    "docs/versions.md": 2,
}


def _tier(page):
    marks = [pytest.mark.nightly] if page in NIGHTLY else [pytest.mark.e2e]
    return pytest.param(page, marks=[] if page in QUICK else marks)


def _run(page, folder):
    setup = page_setups.SETUPS.get(page, dict)
    text = page_setups.smaller(page, WITH_BLOCKS[page])
    return page_blocks.run_page(text, folder, setup, page)


@pytest.mark.parametrize(
    "page", [_tier(page) for page in WITH_BLOCKS if page not in ELSEWHERE.keys() | ON_EIGHT_DEVICES]
)
def test_the_programs_of_a_page_run_and_print_what_it_shows(page, tmp_path):
    _run(page, tmp_path)


@pytest.mark.e2e
@pytest.mark.parametrize("page", sorted(ON_EIGHT_DEVICES))
def test_the_programs_of_a_page_run_on_eight_devices(page, tmp_path):
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import jax, page_blocks, page_setups\n"
        f"page, folder = {page!r}, {str(tmp_path)!r}\n"
        "setup = page_setups.SETUPS[page]\n"
        "names = page_blocks.run_page(page_blocks.pages()[page], folder, setup, page)\n"
        "params, tx, tokens = (names[name] for name in ('params', 'tx', 'tokens'))\n"
        "updated, _ = names['step'](params, tx.init(params), tokens)\n"
        "print(len(updated['table'].sharding.device_set))"
    )
    assert run_on_eight_devices(program).split()[-1] == "8"


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_the_other_tests_of_pages_exist_and_name_their_page(page):
    test = (page_blocks.ROOT / "tests" / ELSEWHERE[page]).read_text()
    assert pathlib.Path(page).stem in test
    assert page in WITH_BLOCKS


@pytest.mark.parametrize("page", sorted(PAGES))
def test_every_block_is_of_a_known_kind_and_none_is_left_out_unseen(page):
    check_blocks(PAGES[page], page)


def check_blocks(text, page):
    """Raises AssertionError if a page has a block that `page_blocks` does not see or know."""
    blocks = page_blocks.blocks_of(text)
    # Each block begins and ends with three backticks at the start of a line, not in a list.
    fences = re.findall(r"^[ \t>]*(?:[-*] +)?(?:```|~~~)", text, re.MULTILINE)
    assert fences == ["```"] * (2 * len(blocks)), page
    for block in blocks:
        assert block.language in page_blocks.LANGUAGES, f"{page}, line {block.line}"
    left_out = [block.note for block in blocks if block.kind in ("not run", "not compared")]
    assert len(left_out) == LEFT_OUT.get(page, 0), left_out
    assert all(note.strip() for note in left_out), f"{page}: a block is left out without a reason"


@pytest.mark.parametrize(
    "text",
    [
        "- item\n\n  ```python\n  x = 1\n  ```\n", "> ```python\n> x = 1\n> ```\n",
        "- ```python\n  x = 1\n  ```\n", "~~~python\nx = 1\n~~~\n", "````python\nx = 1\n````\n",
        "```py\nx = 1\n```\n", "```\nx = 1\n```\n", "```python\nx = 1\n",
        "<!-- not run: a reason -->\n\n```python\nx = 1\n```\n",
        "<!-- not run:  -->\n\n```sh\ndpoptax verify\n```\n",
    ],
)  # fmt: skip
def test_blocks_that_would_not_run_are_found(text):
    # The last one is on a page that may leave out one block, but not without a reason.
    page = "docs/command_line.md" if "not run:  " in text else "page"
    check_blocks("```python\nx = 1\n```\n", "page")
    with pytest.raises(AssertionError):
        check_blocks(text, page)


def test_wrong_outputs_values_and_errors_are_found(tmp_path):
    page = "```python\nprint(1 + 1)\nx = 2 / 3\nx  # {}\n```\n\n```text\n{}\n```\n"
    page_blocks.run_page(page.format(0.67, 2), tmp_path)
    for wrong in ((0.67, 3), (0.66, 2), (0.7, "")):
        with pytest.raises(AssertionError):
            page_blocks.run_page(page.format(*wrong), tmp_path)
    page_blocks.run_page("```python\n{}['a'] = 1\n```".replace("{}", "names = {}\nnames"), tmp_path)
    for wrong in ("missing", "1 / 0", "x = 1\nx.missing  # 1"):
        with pytest.raises((NameError, ZeroDivisionError, AttributeError)):
            page_blocks.run_page(f"```python\n{wrong}\n```\n", tmp_path)
    page_blocks.run_page("<!-- not run: no reason -->\n\n```python\nmissing\n```\n", tmp_path)
    with pytest.raises(SystemExit):
        page_blocks.run_page("```sh\ndpoptax epsilon --missing 1\n```\n", tmp_path)


def messages():
    """Returns the text of every string of the package, with three dots for what is filled in."""

    def text(node):
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) for part in node.values)
        return node.value if isinstance(node, ast.Constant) else "…"

    for path in (page_blocks.ROOT / "dpoptax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                yield text(node)


@pytest.mark.seconds
def test_every_error_of_the_questions_is_one_of_the_library():
    page = PAGES["docs/faq.md"]
    known = "\n".join(messages())
    shown = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(shown) > 20
    for error in shown:
        assert error in known, error
    assert "the plan is for … apples" not in known

"""Pages link only to files and sections that exist, and name only what the package exports."""

import importlib
import pathlib
import re

import pytest

import dpoptax

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_name_of_the_package_exists(page):
    for name in re.findall(r"\bdpoptax(?:\.[A-Za-z_]\w*)+", page.read_text()):
        value = dpoptax
        for part in name.split(".")[1:]:
            # The page on extending is for contributors, who change private modules.
            public = not part.startswith("_") or page.name == "extending.md"
            assert public, f"{page.name} names {name}, which is private"
            if not hasattr(value, part):
                value = importlib.import_module(f"{value.__name__}.{part}")
            else:
                value = getattr(value, part)


def test_a_dead_link_and_a_wrong_name_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[a](missing.md) `dpoptax.privatise`")
    for check in (test_every_link_leads_to_a_file, test_every_name_of_the_package_exists):
        with pytest.raises((AssertionError, ImportError)):
            check(page)

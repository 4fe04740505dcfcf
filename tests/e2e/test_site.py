"""The documentation site builds without a warning, and has every public name and no dead link."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from tools.public_names import documented_names
from tools.site.links import broken_links
from tools.site.reference import page_of, reference_pages

ROOT = pathlib.Path(__file__).parents[2]
# What people look for, and the page or section that they should find.
SEARCHES = {
    "batch norm": "faq/#does-batch-norm-work",
    "batchnorm": "faq/#loss_fn-normalizes-by-statistics-of-the-batch-in-batchnorm",
    "delta": "faq/#what-delta-should-i-take",
    "opacus": "from_opacus/",
    "user": "faq/#how-do-i-protect-users-who-have-several-rows-each",
    "lora": "trainers/lora/",
    "crash": "long_runs/",
}


def test_every_public_name_is_in_the_reference():
    pages = reference_pages()
    for name in documented_names():
        assert f"\n::: {name}\n" in pages[page_of(name)], name


@pytest.mark.e2e
@pytest.mark.skipif(not importlib.util.find_spec("zensical"), reason="needs dpoptax[docs]")
def test_the_site_builds_without_a_warning_and_search_finds_what_people_look_for():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tools.site"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site = ROOT / "out" / "site" / "html"
    for name in documented_names():
        html = (site / page_of(name).removesuffix(".md") / "index.html").read_text()
        assert f'id="{name}"' in html, name
    assert (site / "llms.txt").read_text().count("](") > 50
    index = json.loads((site / "search.json").read_text())
    titles = {item["location"]: item["title"].lower() for item in index["items"]}
    for words, location in SEARCHES.items():
        # A search shows pages and sections first that have the words in their title.
        assert words in titles[location], titles[location]


def test_dead_links_and_foreign_files_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text('<h1 id="one">A</h1><a href="../b.html#two">b</a>')
    (tmp_path / "b.html").write_text(
        '<h1 id="two">B</h1><a href="a/#one">a</a><a href="#two">b</a>'
    )
    assert broken_links(tmp_path) == []
    for wrong in ('<a href="c.html">', '<a href="a/#two">', '<a href="#one">', '<img src="c.png">',
                  '<script src="https://example.com/a.js">',
                  '<link rel="stylesheet" href="//example.com/a.css">'):  # fmt: skip
        (tmp_path / "b.html").write_text(f'<h1 id="two">B</h1>{wrong}')
        assert len(broken_links(tmp_path)) == 1, wrong

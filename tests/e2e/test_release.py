"""A release is rehearsed, and the check of a release finds what is wrong with it."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

from tools import release
from tools.site.links import broken_links
from tools.site.versions import of_tag, publish, with_version

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]

needs_tools = pytest.mark.skipif(
    not (importlib.util.find_spec("build") and importlib.util.find_spec("twine"))
    or not (ROOT / ".git").exists(),
    reason="needs a clone with git, and pip install build twine",
)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    return release.build(ROOT, folder / "dist", folder / "tree")


@needs_tools
@pytest.mark.e2e
def test_both_archives_hold_what_they_should(archives):
    wheel, sdist, of_tree = archives
    files = release.files_of(ROOT)
    assert not release.sdist_problems(sdist, files)
    assert not release.wheel_problems(wheel, of_tree, files)
    assert subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)], check=False
    ).returncode == 0  # fmt: skip
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "tests/README.md", "dpoptax/py.typed"} <= names


@needs_tools
@pytest.mark.e2e
def test_a_wheel_that_is_not_that_of_the_tree_is_found(archives, tmp_path):
    wheel, sdist, of_tree = archives
    files = release.files_of(ROOT)
    assert "lacks dpoptax/new.py" in str(release.sdist_problems(sdist, files | {"dpoptax/new.py"}))
    assert "should not have README.md" in str(release.sdist_problems(sdist, files - {"README.md"}))
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name == "dpoptax/_plan.py":
                text += b"# another line\n"
            if name.endswith("/METADATA"):
                text += b"[a page](docs/start.md)\n[b]: docs/b.md\n<img src='docs/c.png'>\n"
            if name != "dpoptax/py.typed":
                new.writestr(name, text)
    found = "\n".join(release.wheel_problems(changed, of_tree, files))
    for problem in (
        "lacks py.typed",
        "differ in",
        "dpoptax/_plan.py",
        "'docs/start.md', 'docs/b.md', 'docs/c.png'",
    ):
        assert problem in found


@needs_tools
def test_a_folder_that_the_source_archive_leaves_out_is_found():
    assert not release.left_out({*release.files_of(ROOT, tracked=True), ".new/settings"})
    (found,) = release.left_out({"new/a.py", "new/b.py"})
    assert "does not include new in" in found


# Not a test of the e2e tier: it installs JAX and more, which takes minutes.
@needs_tools
@pytest.mark.nightly
def test_the_wheel_works_in_an_empty_environment(archives, tmp_path):
    wheel, _, _ = archives
    for python in release.found_pythons():
        assert not release.install_problems(wheel, python, tmp_path / pathlib.Path(python).name)


def copied(folder):
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_the_versions_of_all_files_agree(tmp_path):
    assert not release.version_problems(ROOT, None)
    root = copied(tmp_path)
    changelog = root / "CHANGELOG.md"
    section = re.compile(rf"^## {re.escape(VERSION)} \(.*\)$", re.MULTILINE)
    changelog.write_text(section.sub(f"## {VERSION} (2026-01-31)", changelog.read_text()))
    assert not release.version_problems(root, f"v{VERSION}")
    assert "the tag is v9.9" in str(release.version_problems(root, "v9.9"))
    changelog.write_text(section.sub(f"## {VERSION} (not yet)", changelog.read_text()))
    assert not release.version_problems(root, None)
    assert "no date" in str(release.version_problems(root, f"v{VERSION}"))
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace(f'version = "{VERSION}"', 'version = "9.9"'))
    found = str(release.version_problems(root, None))
    assert "CITATION.cff has another version" in found
    assert "no section '## 9.9" in found


def test_the_page_lists_every_extra():
    page = (ROOT / "docs" / "versions.md").read_text()
    section = page.partition("\n## Extras\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == sorted(PROJECT["optional-dependencies"])
    start = (ROOT / "docs" / "start.md").read_text()
    named = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", start, re.MULTILINE)
    assert {name for cell in named for name in re.findall(r"\w+", cell)} <= {row[0] for row in rows}


def test_the_workflow_publishes_without_a_token():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    publishing = workflow.partition("\n  publish:\n")[2].partition("\n  docs:\n")[0]
    for line in ("id-token: write", "environment: release", "uses: pypa/gh-action-pypi-publish@"):
        assert line in publishing
    assert "password" not in workflow
    assert "secrets." not in workflow
    # Only the job that publishes may ask for the identity.
    assert workflow.count("id-token") == 1


def site(folder, text):
    (folder / "start").mkdir(parents=True)
    (folder / "index.html").write_text(f'<h1 id="one">{text}</h1><a href="start/">start</a>')
    (folder / "start" / "index.html").write_text('<a href="../#one">home</a>')
    return folder


def test_sites_of_two_versions_stand_side_by_side(tmp_path):
    into = tmp_path / "pages"
    assert publish(site(tmp_path / "a", "first"), into, "0.9.0") == ["0.9.0"]
    assert publish(site(tmp_path / "b", "second"), into, "0.10.0") == ["0.10.0", "0.9.0"]
    versions = publish(site(tmp_path / "c", "third"), into, "0.10.0rc1")
    assert versions == ["0.10.0", "0.10.0rc1", "0.9.0"]
    listed = json.loads((into / "versions.json").read_text())
    assert [entry["version"] for entry in listed] == versions
    assert [entry["aliases"] for entry in listed] == [["latest"], [], []]
    assert 'url=0.10.0/"' in (into / "index.html").read_text()
    assert not broken_links(into)
    # Built again, a version is replaced, and the others stay.
    publish(site(tmp_path / "d", "fourth"), into, "0.9.0")
    assert "fourth" in (into / "0.9.0" / "index.html").read_text()
    assert "second" in (into / "0.10.0" / "index.html").read_text()
    with pytest.raises(ValueError, match="expected a version such as"):
        publish(tmp_path / "a", into, "../elsewhere")


def test_a_site_of_a_version_links_to_its_tag():
    settings = (ROOT / "tools" / "site" / "zensical.toml").read_text()
    read = tomllib.loads(with_version(settings, "0.2.0"))["project"]
    assert read["site_url"].endswith("/dpoptax/0.2.0/")
    assert read["extra"]["version"] == {"provider": "mike"}
    page = of_tag("[a](https://github.com/dpoptax/dpoptax/blob/main/examples/a.py)", "0.2.0")
    assert page.endswith("/blob/v0.2.0/examples/a.py)")


@pytest.mark.e2e
def test_the_two_options_of_a_version_go_together():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tools.site", "--version", "0.2.0"], cwd=ROOT, check=False,
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "go together" in done.stderr

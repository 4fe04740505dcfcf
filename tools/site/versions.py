"""Keeps the documentation of several versions side by side, one folder for each.

    python -m tools.site --version 0.2.0 --into pages

The theme shows a list of the versions from `versions.json`, in the format of the tool mike.
It needs no other tool: a version is a folder, and removing the folder removes the version.
"""

import json
import pathlib
import re
import shutil

# The place of the repository in the links of a page.
BRANCH = "/blob/main/"
SELECTOR = '\n[project.extra.version]\nprovider = "mike"\n'
FIRST_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>dpoptax</title>
<meta http-equiv="refresh" content="0; url={newest}/">
<p>Documentation of dpoptax:</p>
<ul>
{links}
</ul>
"""


def with_version(settings: str, version: str) -> str:
    """Returns the settings of the site for one version among several."""
    settings, count = re.subn(
        r'^site_url = "(.*)"$', rf'site_url = "\g<1>{version}/"', settings, flags=re.MULTILINE
    )
    if count != 1:
        raise ValueError("expected one site_url in the settings of the site")
    return settings + SELECTOR


def of_tag(page: str, version: str) -> str:
    """Returns a page whose links into the repository lead to the tag of a version."""
    return page.replace(BRANCH, f"/blob/v{version}/")


def publish(html: pathlib.Path, into: pathlib.Path, version: str) -> list[str]:
    """Puts a built site beside those of other versions; returns all versions, the newest first."""
    if not re.fullmatch(r"\d+(\.\d+)+[a-z0-9.]*", version):
        raise ValueError(f"expected a version such as 0.2.0; got {version!r}")
    shutil.rmtree(into / version, ignore_errors=True)
    shutil.copytree(html, into / version)
    versions = sorted(
        (path.parent.name for path in into.glob("*/index.html")), key=_place, reverse=True
    )
    listed = [{"version": name, "title": name, "aliases": []} for name in versions]
    listed[0]["aliases"] = ["latest"]
    (into / "versions.json").write_text(json.dumps(listed, indent=2) + "\n")
    links = "\n".join(f'<li><a href="{name}/">{name}</a></li>' for name in versions)
    (into / "index.html").write_text(FIRST_PAGE.format(newest=versions[0], links=links))
    return versions


def _place(version: str) -> tuple[tuple[int, ...], bool, str]:
    """Orders versions; one with letters, such as 0.2.0rc1, comes before that without."""
    numbers, rest = re.fullmatch(r"(\d+(?:\.\d+)*)(.*)", version).groups()  # type: ignore[union-attr]
    return tuple(map(int, numbers.split("."))), not rest, rest

"""Builds the documentation site: copies the pages, writes the reference, and checks every link.

    python -m tools.site    # the site is then in out/site/html; open index.html
    python -m tools.site --version 0.2.0 --into pages    # beside the sites of other versions

Zensical makes the HTML. The pages of docs/ stay as GitHub shows them. The copy differs in three
things: links to files outside of the site lead to the repository, names of the API in backticks
lead to the reference, and lists have the blank line above them that Python-Markdown needs.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator

from tools.public_names import documented_names
from tools.site.links import broken_links
from tools.site.reference import page_of, reference_pages
from tools.site.versions import of_tag, publish, with_version

ROOT = pathlib.Path(__file__).parents[2]
HERE = pathlib.Path(__file__).parent
OUT = ROOT / "out" / "site"
REPOSITORY = "https://github.com/dpoptax/dpoptax/blob/main"
PICTURES = (".png", ".svg")


def main(arguments: list[str] | None = None) -> int:
    """Builds the site, and returns 1 if a link is broken or a page is not in the navigation."""
    parser = argparse.ArgumentParser(prog="python -m tools.site", description="Builds the site.")
    parser.add_argument("--version", help="for one version among several, such as 0.2.0")
    parser.add_argument("--into", type=pathlib.Path, help="the folder of all versions")
    options = parser.parse_args(arguments)
    if (options.version is None) != (options.into is None):
        parser.error("--version and --into go together")
    html = build_site(options.version)
    problems = broken_links(html)
    print(*problems, sep="\n")
    if options.into and not problems:
        print("versions:", *publish(html, options.into, options.version))
    return 1 if problems else 0


def build_site(version: str | None) -> pathlib.Path:
    """Builds the site of one version, or of none, and returns its folder."""
    shutil.rmtree(OUT, ignore_errors=True)
    docs = OUT / "docs"
    sections = read_sections()
    reference = reference_pages()
    for page in (page for _, pages in sections for page in pages):
        text = staged(page)
        write(docs / page, text if version is None else of_tag(text, version))
    for page, text in reference.items():
        write(docs / page, text)
    for picture in (path for path in (ROOT / "docs").rglob("*") if path.suffix in PICTURES):
        target = docs / picture.relative_to(ROOT / "docs")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    shutil.copy(HERE / "extra.css", docs)
    navigation = [pages[0] if not title else {title: pages} for title, pages in sections]
    navigation.append({"API reference": list(reference)})
    settings = (HERE / "zensical.toml").read_text()
    settings = settings if version is None else with_version(settings, version)
    nav = f"nav = {_toml(navigation)}\n"
    write(OUT / "zensical.toml", settings.replace("[project]\n", f"[project]\n{nav}", 1))
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    subprocess.run(build, cwd=OUT, check=True, env={**os.environ, "PYTHONPATH": _path()})
    for page in [page for _, pages in sections for page in pages] + list(reference):
        write(OUT / "html" / page, (docs / page).read_text())
    write(OUT / "html" / "llms.txt", llms_txt([*sections, ("API reference", list(reference))]))
    return OUT / "html"


def read_sections() -> list[tuple[str, list[str]]]:
    """Returns the sections of the navigation with those of their pages that exist."""
    listed = tomllib.loads((HERE / "pages.toml").read_text())["section"]
    sections = [
        (section.get("title", ""), [page for page in section["pages"] if source(page).exists()])
        for section in listed
    ]
    known = {page for _, pages in sections for page in pages}
    for path in sorted((ROOT / "docs").rglob("*.md")):
        page = path.relative_to(ROOT / "docs").as_posix()
        if page not in known:
            raise SystemExit(f"docs/{page} is on no list: add it to tools/site/pages.toml")
    return [(title, pages) for title, pages in sections if pages]


def llms_txt(sections: list[tuple[str, list[str]]]) -> str:
    """Returns an index of the Markdown pages for language models, as llmstxt.org describes it."""
    lines = ["# dpoptax", "", f"> {_first_paragraph(OUT / 'docs' / 'index.md')}"]
    for title, pages in sections:
        lines += ["", f"## {title}", ""] if title else []
        for page in pages if title else []:
            path = OUT / "docs" / page
            name = path.read_text().splitlines()[0].removeprefix("# ")
            lines.append(f"- [{name}]({page}): {_first_paragraph(path)}")
    return "\n".join(lines) + "\n"


def _first_paragraph(path: pathlib.Path) -> str:
    """Returns the first sentences of a page in one line, without links."""
    paragraph = path.read_text().split("\n\n")[1]
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(paragraph.split()))


def source(page: str) -> pathlib.Path:
    """Returns the file of a page: names in capitals are files at the root of the repository."""
    return (ROOT if page.split(".")[0].isupper() else ROOT / "docs") / page


def staged(page: str) -> str:
    """Returns the text of a page as the site needs it."""
    depth = page.count("/")
    names = documented_names()

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target or not target:
            return match[0]
        file = (source(page).parent / target).resolve()
        path = file.relative_to(ROOT).as_posix()
        inside = path.removeprefix("docs/")
        on_site = file.suffix in (".md", *PICTURES) and source(inside) == file
        if on_site:
            return f"]({'../' * depth}{inside}{anchor})"
        return f"]({REPOSITORY}/{path}{anchor})"

    def name(match: re.Match[str]) -> str:
        path = "dpoptax." + match[1].removeprefix("dpoptax.")
        if path not in names:
            return match[0]
        return f"[`{match[1]}`]({'../' * depth}{page_of(path)}#{path})"

    lines = []
    for is_code, line in _lines(source(page).read_text()):
        if not is_code and not line.startswith("#"):
            line = re.sub(r"\]\(([^)#\s]*)(#[^)]*)?\)", link, line)
            line = re.sub(r"(?<!\[)`([a-z_]\w*(?:\.\w+)+|[a-z]\w+_\w+)`(?!\])", name, line)
            if re.match(r"([-*]|\d+\.) ", line) and lines and re.match(r"[^\s|*-]", lines[-1]):
                lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _lines(text: str) -> Iterator[tuple[bool, str]]:
    is_code = False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        yield is_code or fence, line
        is_code ^= fence


def write(path: pathlib.Path, text: str) -> None:
    """Writes a file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def _toml(navigation: list[object]) -> str:
    """Inline tables of TOML differ from JSON in one character only."""
    return re.sub(r'": \[', '" = [', json.dumps(navigation))


if __name__ == "__main__":
    sys.exit(main())

"""Finds dead links in built HTML pages, and files that would be loaded from other sites."""

import html.parser
import pathlib
import posixpath
import urllib.parse


class _Page(html.parser.HTMLParser):
    """Collects the links, the anchors and the loaded files of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.anchors.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])


def broken_links(site: pathlib.Path) -> list[str]:
    """Returns a line for each link to a page, section or file that the site does not have.

    Links to other sites are not followed. A script, style sheet, font or picture of another site is
    an error, because a reader may be offline, or may not want to be seen.
    """
    pages = {
        path.relative_to(site).as_posix(): _Page(path.read_text()) for path in site.rglob("*.html")
    }
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    found = []
    for name, page in sorted(pages.items()):
        found += [f"{name} loads {url}" for url in page.loads if "://" in url or url[:2] == "//"]
        local = [url for url in page.loads if not url.startswith("data:")]
        for url in sorted({*page.links, *local}):
            parts = urllib.parse.urlsplit(url)
            if parts.scheme or parts.netloc or name == "404.html":
                continue
            path = urllib.parse.unquote(parts.path)
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
            target = name if not path else target
            if (site / target).is_dir():
                target = posixpath.normpath(posixpath.join(target, "index.html"))
            if target not in files:
                found.append(f"{name} links to {url}, which does not exist")
            elif (
                target in pages
                and urllib.parse.unquote(parts.fragment) not in pages[target].anchors
            ):
                found.append(f"{name} links to {url}, a section that does not exist")
    return found

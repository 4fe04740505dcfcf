"""The table in README.md lists every test file, and no other."""

import pathlib
import re

FOLDER = pathlib.Path(__file__).parent


def test_the_table_lists_every_test_file():
    listed = re.findall(r"^\| `(\S+\.py)` \|", (FOLDER / "README.md").read_text(), re.MULTILINE)
    found = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("test_*.py")]
    assert sorted(listed) == sorted(found), "add a line to the table in tests/README.md"

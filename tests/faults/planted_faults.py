"""Planted faults: the lists in this folder, and how a fault is put into a copy of the library."""

import pathlib
import shutil
import tomllib

import attrs

FOLDER = pathlib.Path(__file__).parent
ROOT = FOLDER.parents[1]
TABLE = ROOT / "docs" / "planted_faults.md"


@attrs.frozen
class Fault:
    """A bug that is planted in a copy of the library, and the tests that must fail then.

    Attributes:
        name: of the fault.
        area: the file that lists it.
        wrong: what goes wrong, in a sentence for the table.
        seen: where such a bug was seen.
        tests: the tests that must fail, as pytest names them.
        file: the file with the bug, in `dpoptax`.
        old: a text that occurs in this file exactly once.
        new: the text with the bug.
    """

    name: str
    area: str
    wrong: str
    seen: str
    tests: list[str]
    file: str
    old: str
    new: str


def load() -> list[Fault]:
    """Returns all faults, by area."""
    found = []
    for path in sorted(FOLDER.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text()).items():
            found.append(Fault(name, path.stem, **entry))
    return found


def planted(fault: Fault, text: str) -> str:
    """Returns the text of the file with the bug.

    Raises:
        ValueError: the old text does not occur exactly once, or the new text is the same.
    """
    old, new = fault.old.strip("\n"), fault.new.strip("\n")
    if (count := text.count(old)) != 1:
        raise ValueError(
            f"the old text of {fault.name} must occur exactly once in dpoptax/{fault.file}; it "
            f"occurs {count} times. The code has changed: write the bug into the new code.\n{old}"
        )
    if old == new:
        raise ValueError(f"the new text of {fault.name} is the same as the old one")
    return text.replace(old, new)


def plant(fault: Fault, root: pathlib.Path) -> None:
    """Puts a fault into the copy of the library at `root`."""
    path = root / "dpoptax" / fault.file
    path.write_text(planted(fault, path.read_text()))


def remove(fault: Fault, root: pathlib.Path) -> None:
    """Restores the file of a fault in the copy at `root`."""
    shutil.copy(ROOT / "dpoptax" / fault.file, root / "dpoptax" / fault.file)


def table(faults: list[Fault]) -> str:
    """Returns the page of the documentation that lists the faults."""
    lines = [
        "# Faults that the tests catch",
        "",
        "Privacy bugs are silent: a model that trains with too little noise trains better. So we",
        "plant bugs in a copy of this library, one at a time. For each of them a named test must",
        'fail. Other libraries had these bugs, or this one nearly had them. The column "seen" says',
        'where; "nearly here" means in this library.',
        "",
        "`make faults` plants all of them. First it checks that the tests pass without a fault.",
        "`make faults ARGS=keys` plants those of one area. Write the name of a fault",
        "with underscores to plant only this one: `make faults ARGS=one_key_for_all_leaves`.",
        "",
        "`make faults ARGS=--list` prints all names. `make faults ARGS=--write-table` writes this",
        "page from the list in `tests/faults/*.toml`.",
        "",
    ]
    for area in dict.fromkeys(fault.area for fault in faults):
        lines += [
            f"## {area.replace('_', ' ').capitalize()}",
            "",
            "| fault | what goes wrong | seen | caught by |",
            "|---|---|---|---|",
        ]
        for fault in (fault for fault in faults if fault.area == area):
            tests = "<br>".join(f"`{_short(test)}`" for test in fault.tests)
            name = fault.name.replace("_", " ")
            lines.append(f"| {name} | {fault.wrong} | {fault.seen} | {tests} |")
        lines.append("")
    return "\n".join(lines)


def _short(test: str) -> str:
    """The name of a test without its parameters, which may have characters of a table."""
    return test.removeprefix("tests/").partition("[")[0]

"""Rehearses a release: everything but the upload.

    python tools/release.py                    # build, check, and try what was built
    python tools/release.py --tag v0.1.0       # also: does the tag fit the version?
    python tools/release.py --out dist         # keep the archives
    python tools/release.py --no-install       # build and check only

It builds the source archive and the wheel, and checks that both hold what they should. Then it
installs the wheel into an empty environment, and runs the first program of the README and the
command line there: with this Python, and with the other Pythons of `PYTHONS` that it finds.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
# The oldest and the newest Python that are supported.
PYTHONS = ("python3.11", "python3.13")
# Links and pictures that are relative: in Markdown, as references, and in HTML.
ELSEWHERE = r"(?!https?://|mailto:|#)"
LINKS = (
    re.compile(rf"\]\(<?{ELSEWHERE}([^)]+)\)"),
    re.compile(rf"^\[[^]]+\]: +<?{ELSEWHERE}(\S+)", re.MULTILINE),
    re.compile(rf"(?:src|href)=[\"']{ELSEWHERE}([^\"']+)"),
)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 and prints what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tag", help="the tag of the release, such as v0.1.0")
    parser.add_argument("--out", type=pathlib.Path, help="an empty folder for the archives")
    parser.add_argument("--no-install", action="store_true", help="do not install the wheel")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        out = options.out or folder / "dist"
        problems = version_problems(ROOT, options.tag)
        if options.tag is not None:
            problems += uncommitted(ROOT)
        wheel, sdist, wheel_of_tree = build(ROOT, out, folder / "tree")
        say(f"built {wheel.name} and {sdist.name}")
        twine = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
        if subprocess.run(twine, check=False).returncode:
            problems.append("twine refuses the metadata, see above")
        files = files_of(ROOT)
        problems += left_out(files_of(ROOT, tracked=True))
        problems += sdist_problems(sdist, files)
        problems += wheel_problems(wheel, wheel_of_tree, files)
        for python in [] if options.no_install or problems else found_pythons():
            say(f"installing into an empty environment of {python}")
            problems += install_problems(wheel, python, folder / pathlib.Path(python).name)
    print(*(f"release: {problem}" for problem in problems), sep="\n")
    say("nothing is wrong" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


def say(text: str) -> None:
    """Prints a step at once, between the outputs of other programs."""
    print(f"release: {text}", flush=True)


def version_problems(root: pathlib.Path, tag: str | None) -> list[str]:
    """Compares the version of the package with those of the citation, the changelog and the tag."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    problems = []
    if f"version: {version}\n" not in (root / "CITATION.cff").read_text().replace('"', ""):
        problems.append(
            f"CITATION.cff has another version than pyproject.toml, which has {version}"
        )
    heading = re.search(
        rf"^## {re.escape(version)} \((.+)\)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    if heading is None:
        problems.append(f"CHANGELOG.md has no section '## {version} (DATE)'")
    if tag is None:
        return problems
    if tag != f"v{version}":
        problems.append(f"the tag is {tag}, and the version is {version}: expected v{version}")
    if heading is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", heading[1]):
        problems.append(f"CHANGELOG.md has no date for {version}, but '{heading[1]}'")
    return problems


def uncommitted(root: pathlib.Path) -> list[str]:
    """A release is made of what the tag names, and of nothing else."""
    done = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
    )
    return [f"not committed: {line}" for line in done.stdout.splitlines()]


def build(
    root: pathlib.Path, out: pathlib.Path, of_tree: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Builds a source archive, the wheel of that archive, and a wheel of the tree."""
    command = [sys.executable, "-m", "build", "--outdir"]
    # Without --wheel, the wheel is built from the source archive.
    subprocess.run([*command, str(out), str(root)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(
        [*command, str(of_tree), "--wheel", str(root)], check=True, stdout=subprocess.DEVNULL
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    (wheel_of_tree,) = of_tree.glob("*.whl")
    return wheel, sdist, wheel_of_tree


def files_of(root: pathlib.Path, *, tracked: bool = False) -> set[str]:
    """Returns the files that git does not ignore, or only those that it tracks."""
    command = ["git", "ls-files", "-z", "--cached"]
    command += [] if tracked else ["--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (root / name).is_file()}


def included() -> set[str]:
    """Returns the folders and files that pyproject.toml includes in a source archive."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return set(settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])


def left_out(files: set[str]) -> list[str]:
    """Everything goes into a source archive but the settings of other programs, such as .github."""
    tops = {name.split("/")[0] for name in files} - {"pyproject.toml"}  # the build adds it
    inside = included()
    missing = sorted(top for top in tops if f"/{top}" not in inside and top[0] != ".")
    return [f"pyproject.toml does not include {name} in the source archive" for name in missing]


def sdist_problems(sdist: pathlib.Path, files: set[str]) -> list[str]:
    """Compares a source archive with the files that pyproject.toml includes."""
    # The build adds these itself.
    expected = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    inside = included()
    expected |= {name for name in files if {f"/{name}", f"/{name.split('/')[0]}"} & inside}
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return _differences(sdist.name, names, expected)


def wheel_problems(wheel: pathlib.Path, wheel_of_tree: pathlib.Path, files: set[str]) -> list[str]:
    """Checks what a wheel holds, and that the source archive gives the same as the tree."""
    content, of_tree = _content(wheel), _content(wheel_of_tree)
    code = {name for name in content if ".dist-info/" not in name}
    expected = {name for name in files if name.startswith("dpoptax/")}
    problems = _differences(wheel.name, code, expected)
    if "dpoptax/py.typed" not in code:
        problems.append(f"{wheel.name} lacks py.typed, so type checkers see no types")
    differing = {name for name in content if content[name] != of_tree.get(name)}
    if differing or set(content) != set(of_tree):
        names = ", ".join(sorted(differing | (set(of_tree) - set(content))))
        problems.append(f"the wheels of the source archive and of the tree differ in {names}")
    (metadata,) = (text for name, text in content.items() if name.endswith("/METADATA"))
    relative = [name for pattern in LINKS for name in pattern.findall(metadata.decode())]
    if relative:
        problems.append(f"the description for PyPI has links that lead nowhere there: {relative}")
    return problems


def _content(wheel: pathlib.Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _differences(archive: str, names: set[str], expected: set[str]) -> list[str]:
    pairs = (("lacks", expected - names), ("should not have", names - expected))
    return [f"{archive} {verb} {', '.join(sorted(found))}" for verb, found in pairs if found]


def found_pythons() -> list[str]:
    """Returns this Python, and the others of `PYTHONS` that run."""
    found = [sys.executable]
    for name in PYTHONS:
        if name == f"python{sys.version_info.major}.{sys.version_info.minor}":
            continue
        path = shutil.which(name)
        # A name may lead to a version manager that has no such version.
        if path is not None and not subprocess.run([path, "-c", ""], check=False).returncode:
            found.append(path)
        else:
            say(f"no {name} here, so it was not tried")
    return found


def install_problems(wheel: pathlib.Path, python: str, folder: pathlib.Path) -> list[str]:
    """Installs a wheel into an empty environment, and does there what a new user does."""
    place = folder / "environment"
    subprocess.run([python, "-m", "venv", str(place)], check=True)
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    # Neither this environment nor this folder may help.
    env = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    env["PATH"] = os.pathsep.join([str(scripts), env.get("PATH", "")])
    env.pop("VIRTUAL_ENV", None)
    own_python = str(scripts / "python")
    program = folder / "program.py"
    program.write_text(BLOCK.findall((ROOT / "README.md").read_text())[0])
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    steps = [
        ([own_python, "-m", "pip", "install", "--quiet", f"{wheel}[examples]"], ""),
        ([own_python, "-c", "import dpoptax; print(dpoptax.__version__)"], version),
        ([own_python, str(program)], "(2.000, 1e-05)-differential privacy"),
        ([str(scripts / "dpoptax"), "--help"], "usage: dpoptax"),
        ([str(scripts / "dpoptax"), "epsilon", *EPSILON.split()], "epsilon = "),
    ]
    for command, expected in steps:
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode or expected not in done.stdout:
            what = " ".join([pathlib.Path(command[0]).name, *command[1:3]])
            return [f"with {python}, `{what}` failed: {done.stderr[-2000:] or done.stdout[-2000:]}"]
    return []


EPSILON = "--num-examples 1000 --batch-size 100 --steps 5 --noise-multiplier 2"


if __name__ == "__main__":
    sys.exit(main())

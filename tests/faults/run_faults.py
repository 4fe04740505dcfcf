"""Plants each fault in a copy of the library, and sees a named test fail.

    python tests/faults/run_faults.py                       every fault
    python tests/faults/run_faults.py divide_before_noise   some of them
    python tests/faults/run_faults.py --list | --write-table

First the named tests must pass on a copy without a fault. Then the tests of each fault run in a
separate process, which imports the copy with the fault. A fault counts as caught if a check of
a test fails. A test that ends for another reason, such as an import error, does not count.
"""

import argparse
import collections
import compileall
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import py_compile
import queue
import shutil
import signal
import sys
import time

import attrs
import planted_faults

COPIES = planted_faults.ROOT / ".pytest_cache" / "faults"
# No test may take longer; a fault may cause an endless loop.
SECONDS = 300
# Imported once, by the server that the processes are forked from: each of them would take seconds
# for it. dpoptax is not among them.
IMPORTED_ONCE = """
    dp_accounting dp_accounting.pld.privacy_loss_distribution equinox flax.linen flax.nnx haiku
    hypothesis jax.experimental.multihost_utils numpyro optax orbax.checkpoint pytest scipy.linalg
    scipy.optimize scipy.signal scipy.stats tqdm
"""


@attrs.frozen
class Run:
    """How the tests of one process ended, and how many processor seconds it took."""

    seconds: float
    outcomes: dict[str, dict[str, str]]
    problem: str = ""


def copy_library(roots: list[pathlib.Path]) -> None:
    """Copies the library and its tests to folders; keeps what is there if nothing has changed."""
    folders, files = ("dpoptax", "tests"), ("pyproject.toml", "README.md")
    digest = hashlib.sha256()
    for name in (*folders, *files):
        path = planted_faults.ROOT / name
        for found in sorted(path.rglob("*.*")) if path.is_dir() else [path]:
            if found.is_file() and found.suffix != ".pyc":
                digest.update(str(found).encode() + found.read_bytes())
    source = planted_faults.ROOT
    for root in roots:
        stamp = root / "copied"
        if not stamp.exists() or stamp.read_text() != digest.hexdigest():
            root.mkdir(parents=True, exist_ok=True)
            stamp.unlink(missing_ok=True)
            _copy(source, root, folders, files)
            stamp.write_text(digest.hexdigest())
        source = root


def _copy(
    source: pathlib.Path, root: pathlib.Path, folders: tuple[str, ...], files: tuple[str, ...]
) -> None:
    is_first = source == planted_faults.ROOT
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc") if is_first else None
    for name in folders:
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(source / name, root / name, ignore=ignored)
    for name in files:
        shutil.copy(source / name, root / name)
    if is_first:
        # Python compares the source with these files and not their times, which may be equal.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root, quiet=1, invalidation_mode=mode)


def in_process(root: pathlib.Path, tests: list[str]) -> None:
    """Runs tests on the copy at `root`, in this process."""
    os.setpgrp()
    with (root / "output.txt").open("w") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    os.chdir(root)
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(root), str(planted_faults.FOLDER)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(planted_faults.FOLDER)])
    os.environ["DPOPTAX_FAULT_OUTCOMES"] = str(root / "outcomes.json")
    import pytest

    options = ["-q", "--quick-compile", "--assert=plain", "--tb=short"]
    plugins = ["-p", "no:cacheprovider", "-p", "record_outcomes"]
    code = pytest.main([*options, *plugins, f"--rootdir={root}", *tests])
    sys.stdout.flush()
    os._exit(int(code))


def run_tests(root: pathlib.Path, tests: list[str], seconds: float = SECONDS) -> Run:
    """Runs tests on the copy at `root`, in a separate process."""
    outcomes, output = root / "outcomes.json", root / "output.txt"
    outcomes.unlink(missing_ok=True)
    process = multiprocessing.get_context("forkserver").Process(
        target=in_process, args=(root, tests)
    )
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Run(seconds, {}, f"the tests took longer than {seconds:.0f} s")
    last_lines = "\n".join(output.read_text().strip().splitlines()[-30:])
    if not outcomes.exists():
        return Run(0.0, {}, f"pytest did not start:\n{last_lines}")
    found = json.loads(outcomes.read_text())
    took = found["seconds"]
    if not pathlib.Path(found["library"]).is_relative_to(root):
        return Run(took, {}, f"the tests did not import the copy, but: {found['library']}")
    if missing := [test for test in tests if test not in found["tests"]]:
        return Run(took, found["tests"], f"pytest did not run {', '.join(missing)}:\n{last_lines}")
    return Run(took, found["tests"])


def start_server(jobs: int) -> None:
    """Starts the server that the processes with the tests are forked from."""
    for name in [name for name in os.environ if "PYTEST" in name]:
        del os.environ[name]
    if jobs > 1:
        os.environ["NPROC"] = "1"  # more threads would only take turns
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED_ONCE.split())


def verdict(fault: planted_faults.Fault, run: Run) -> str:
    """Returns why a fault does not count as caught; empty if it does."""
    if run.problem:
        return run.problem
    errors = [
        f"{test} did not fail in a check, but ended with {outcome['message']}"
        for test, outcome in run.outcomes.items()
        if outcome["outcome"] in ("error", "skipped")
    ]
    if errors:
        return "; ".join(errors)
    passed = [test for test in fault.tests if run.outcomes[test]["outcome"] == "passed"]
    return f"not caught: {', '.join(passed)} passed" if len(passed) == len(fault.tests) else ""


def check_unchanged(roots: list[pathlib.Path], faults: list[planted_faults.Fault]) -> list[str]:
    """Returns which named tests do not pass on a copy without a fault."""
    by_file = collections.defaultdict(list)
    for test in dict.fromkeys(test for fault in faults for test in fault.tests):
        by_file[test.partition("::")[0]].append(test)
    shares: list[list[str]] = [[] for _ in roots]
    for tests in sorted(by_file.values(), key=len, reverse=True):
        min(shares, key=len).extend(tests)
    pairs = [(root, share) for root, share in zip(roots, shares, strict=True) if share]
    with concurrent.futures.ThreadPoolExecutor(len(roots)) as pool:
        runs = list(pool.map(lambda pair: run_tests(*pair, seconds=4 * SECONDS), pairs))
    problems = [run.problem for run in runs if run.problem]
    return problems + [
        f"{test} does not pass without a fault: {outcome['outcome']}, {outcome['message']}"
        for run in runs
        for test, outcome in run.outcomes.items()
        if outcome["outcome"] != "passed"
    ]


def run_faults(
    roots: list[pathlib.Path], faults: list[planted_faults.Fault]
) -> list[tuple[float, str]]:
    """Returns for each fault how long its tests took, and why it does not count as caught."""
    free: queue.Queue[pathlib.Path] = queue.Queue()
    for root in roots:
        free.put(root)

    def one(fault: planted_faults.Fault) -> tuple[float, str]:
        root = free.get()
        try:
            planted_faults.plant(fault, root)
            run = run_tests(root, list(fault.tests))
            result = run.seconds, verdict(fault, run)
        except ValueError as error:
            result = 0.0, str(error)
        finally:
            planted_faults.remove(fault, root)
            free.put(root)
        mark = "caught" if not result[1] else "MISSED"
        print(f"{mark}  {fault.name}  ({result[0]:.0f} s)", flush=True)
        return result

    with concurrent.futures.ThreadPoolExecutor(len(roots)) as pool:
        return list(pool.map(one, faults))


def chosen(names: list[str]) -> list[planted_faults.Fault]:
    """Returns the faults with these names or of these areas; all for no names."""
    faults = planted_faults.load()
    known = {fault.name for fault in faults} | {fault.area for fault in faults}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"there is no fault or area {', '.join(unknown)}; --list shows all")
    return [one for one in faults if not names or one.name in names or one.area in names]


def print_results(faults: list[planted_faults.Fault], results: list[tuple[float, str]]) -> int:
    """Prints the table; returns how many faults were missed."""
    widths = [max(len(fault.name) for fault in faults), max(len(fault.file) for fault in faults)]
    print(f"\n{'fault':{widths[0]}}  {'where':{widths[1]}}  seconds  caught by")
    for fault, (seconds, problem) in zip(faults, results, strict=True):
        by = "MISSED" if problem else ", ".join(fault.tests)
        print(f"{fault.name:{widths[0]}}  {fault.file:{widths[1]}}  {seconds:7.0f}  {by}")
    missed = [
        (fault, problem) for fault, (_, problem) in zip(faults, results, strict=True) if problem
    ]
    for fault, problem in missed:
        print(f"\nMISSED {fault.name}, in dpoptax/{fault.file}: {problem}")
    print(f"\ncaught {len(faults) - len(missed)} of {len(faults)} faults")
    return len(missed)


def main() -> int:
    """Runs what the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="faults or areas; all by default")
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("JOBS") or 2))
    parser.add_argument("--list", action="store_true", help="print the names, and do not run")
    parser.add_argument(
        "--write-table", action="store_true", help=f"write {planted_faults.TABLE.name}"
    )
    parser.add_argument(
        "--only-faults", action="store_true", help="skip the run on a copy without a fault"
    )
    arguments = parser.parse_args()
    faults = chosen(arguments.names)
    if arguments.list:
        print("\n".join(f"{fault.area}: {fault.name}" for fault in faults))
        return 0
    if arguments.write_table:
        planted_faults.TABLE.write_text(planted_faults.table(planted_faults.load()))
        return 0
    start = time.monotonic()
    jobs = max(1, min(arguments.jobs, len(faults)))
    roots = [COPIES / str(number) for number in range(jobs)]
    copy_library(roots)
    start_server(jobs)
    if not arguments.only_faults:
        if problems := check_unchanged(roots, faults):
            print("\n".join(problems))
            return 1
        seconds = time.monotonic() - start
        print(f"all named tests pass on a copy without a fault ({seconds:.0f} s)", flush=True)
    missed = print_results(faults, run_faults(roots, faults))
    print(f"{time.monotonic() - start:.0f} s, {jobs} at a time")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

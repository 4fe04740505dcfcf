"""Settings that hold for every test, and a cache of compiled programs that outlives the run."""

import gc
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
# Programs that only the type checker reads: to look for examples in them would run them.
collect_ignore = ["typing/user_project"]
# A folder that grows beyond this is emptied: every edit of the library leaves dead programs.
LARGEST_CACHE = 2 * 2**30
_HELD = []  # Locks and temporary folders, kept until the process ends.


def _processor() -> str:
    """Compiled programs depend on the instructions that the processor has."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    flags = [line for line in lines if line.startswith(("flags", "Features"))] or lines
    return hashlib.sha256(flags[0].encode()).hexdigest()[:8]


def _compilation_cache() -> pathlib.Path:
    """A folder that no other process uses: JAX may read a file that another one still writes."""
    version = f"{importlib.metadata.version('jax')}-{sys.version_info.minor}-{_processor()}"
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = ROOT / ".pytest_cache" / "jax" / version / worker
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.parent / f"{worker}.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # Windows, a read-only checkout, or a second run beside this one
        _HELD.append(tempfile.TemporaryDirectory(prefix="dpoptax-", ignore_cleanup_errors=True))
        return pathlib.Path(_HELD[-1].name)
    _HELD.append(lock)
    if sum(path.stat().st_size for path in folder.iterdir()) > LARGEST_CACHE:
        shutil.rmtree(folder)
        folder.mkdir()
    return folder


# Both are read when JAX is imported.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_compilation_cache())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has a core of its own: more threads would only take turns with the other worker.
    os.environ.setdefault("NPROC", "1")

# Tracing leaves much garbage, and the compiled programs of a worker are millions of objects. Python
# would look through them all so often that it takes a tenth of the time.
gc.set_threshold(50_000, 50, 100)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

for _name, _examples in (("day", 5), ("all", 20), ("nightly", 100)):
    hypothesis.settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,  # a first example compiles
        derandomize=True,
        database=None,
    )
hypothesis.settings.load_profile("day")  # until --hypothesis-profile says otherwise


# Most programs here run for milliseconds after seconds of compilation. These tests draw or train
# for so long that it pays to optimize their programs; or they measure memory, or compare bits.
OPTIMIZED = (
    "laws/test_noise.py",
    "laws/test_poisson.py",
    "mechanisms/test_discrete_gaussian.py",
    "misuse/test_drift_from_plan.py",
    "misuse/test_large_tables.py",
    "random/",
    "samplers/",
    "vi/contrib/test_gradient_trace.py",
    "vi/test_global_elbo.py",
)

# The newer code generator of XLA takes twice as long as the older one, which JAX 0.11 dropped.
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"

# What that older one does in another way, by a part of the names of the tests.
OF_NEWER_EMITTERS = {
    "narrow whole numbers": "XLA's older code generator looks up other rows",
    "needs_the_memory_of_a_plain_step": "XLA's older code generator needs more memory",
}


def pytest_addoption(parser):
    parser.addoption(
        "--quick-compile",
        action="store_true",
        help="XLA hardly optimizes the programs of most tests",
    )
    parser.addoption(
        "--cpu-durations",
        type=int,
        metavar="N",
        help="show the processor seconds of the N longest files and tests",
    )


def pytest_configure(config):
    if config.getoption("--quick-compile") and jax.__version_info__ < (0, 11):
        flags = os.environ.get("XLA_FLAGS", "")
        if OLDER_EMITTERS not in flags:  # The workers inherit the flags, and configure themselves.
            os.environ["XLA_FLAGS"] = f"{flags} {OLDER_EMITTERS}".strip()
    if config.getoption("--cpu-durations"):
        from cpu_durations import CpuDurations  # `resource` is missing on Windows

        config.pluginmanager.register(CpuDurations(config.getoption("--cpu-durations")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Chooses how XLA compiles a test: before its fixtures, which compile for it as well."""
    if item.config.getoption("--quick-compile"):
        path = item.path.relative_to(ROOT / "tests").as_posix()
        # The longer tests of gradients compare with tolerances for optimized programs.
        precise = path.startswith("per_example/") and item.get_closest_marker("slow")
        optimized = path.startswith(OPTIMIZED) or precise is not None
        jax.config.update("jax_disable_most_optimizations", not optimized)


# Each compiled program takes some entries in the table of memory areas of the process. Linux allows
# 65,530 of them, and XLA aborts the process if there are more.
MOST_AREAS = 40_000


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs between files, when they have become too many for one process."""
    areas = pathlib.Path("/proc/self/maps")
    if (nextitem is not None and nextitem.path == item.path) or not areas.exists():
        return
    if areas.read_bytes().count(b"\n") > MOST_AREAS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    """What a user's program may loosen must hold without loosening."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    """The tests of a file share a worker, and so what they compile.

    So do the examples in the docstrings of a package.
    """
    checked = pytest.mark.skip(reason="the type checks refuse these arguments first")
    older = OLDER_EMITTERS in os.environ.get("XLA_FLAGS", "")
    for item in items:
        for name, reason in OF_NEWER_EMITTERS.items():
            if older and name in item.name:
                item.add_marker(
                    pytest.mark.skip(reason=f"{reason}; the tests for optimized programs run it")
                )
        if config.getoption("jaxtyping_packages", None) and item.get_closest_marker("untyped"):
            item.add_marker(checked)
        if item.get_closest_marker("xdist_group") is not None:
            continue
        path = item.path.relative_to(ROOT)
        is_example = isinstance(item, pytest.DoctestItem)
        group = f"docstrings of {path.parts[1]}" if is_example else str(path)
        item.add_marker(pytest.mark.xdist_group(group))

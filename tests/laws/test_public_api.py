"""What every public name needs: an entry in `__all__`, a docstring and an example that runs."""

import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import dpoptax
from tools.public_names import (
    MODULES,
    NEED_NUMPYRO,
    PUBLIC_MODULES,
    ROOT,
    documented_names,
    public_names,
)

MOST_PUBLIC_NAMES = 166

NAMES = public_names()
DOCUMENTED = documented_names()


def test_there_are_few_public_names():
    """Functions and classes; without the adapters to other libraries that are optional."""
    adapters = ("dpoptax.compat.", "dpoptax.keras.", "dpoptax.tunix.")
    own = [name for name in DOCUMENTED if not name.startswith(adapters)]
    print(f"{len(own)} public names:", *sorted(own), sep="\n  ")
    assert len(own) < MOST_PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_every_public_module_lists_its_names(name):
    if name.startswith(NEED_NUMPYRO):
        pytest.importorskip("numpyro")
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, entry) for entry in module.__all__)


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_tab_completion_shows_public_names_only(name):
    if name.startswith(NEED_NUMPYRO):
        pytest.importorskip("numpyro")
    module = importlib.import_module(name)
    # The hook that checks types adds its module.
    shown = {entry for entry in dir(module) if not entry.startswith("_")} - {"jaxtyping"}
    modules = {other.rpartition(".")[2] for other in PUBLIC_MODULES if other.startswith(name + ".")}
    assert shown - modules == set(module.__all__) - modules - {"__version__"}


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_public_docstrings_have_args_returns_and_an_example_that_runs(name):
    value = DOCUMENTED[name]
    doc = inspect.getdoc(value)
    assert doc, "no docstring"
    assert ">>>" in doc, "no example that runs"
    if inspect.isfunction(value):
        assert "Args:" in doc or not inspect.signature(value).parameters
        assert "Returns:" in doc


@pytest.mark.seconds
@pytest.mark.parametrize("name", MODULES)
def test_every_module_begins_with_a_sentence_that_names_it(name):
    path = ROOT.parent / pathlib.Path(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert doc
    assert doc[0].isupper() or doc.startswith("d3p")
    assert "." in doc or ":" in doc


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_public_jax_is_imported_and_nothing_draws_from_a_global_generator(path):
    for node in ast.walk(ast.parse(path.read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in imported:
            assert not name.startswith("jax._src"), name
            assert not name.startswith("numpy.random"), name
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("np", "random")


def test_the_package_is_typed_and_knows_its_version():
    assert (ROOT / "py.typed").exists()
    assert dpoptax.__version__.count(".") >= 2


def test_names_are_found_at_their_first_use_and_listed_before():
    assert set(dpoptax.__all__) <= set(dir(dpoptax))
    for name in dpoptax.__all__:
        assert getattr(dpoptax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'priavtize'"):
        dpoptax.priavtize  # noqa: B018


IMPORTS = """
import sys
import dpoptax
assert "jax" not in sys.modules
dpoptax.privatize, dpoptax.clipping, dpoptax.mechanisms, dpoptax.random, dpoptax.schedules
heavy = ("dp_accounting", "scipy.stats", "orbax.checkpoint", "numpyro", "matplotlib", "tqdm")
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""


@pytest.mark.e2e
def test_the_transformation_alone_imports_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

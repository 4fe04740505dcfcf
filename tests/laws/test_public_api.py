"""What every public name owes its reader."""

import ast
import importlib
import inspect
import pathlib
import pkgutil

import pytest

import dpoptax

ROOT = pathlib.Path(dpoptax.__file__).parent
MODULES = ["dpoptax"] + [module.name for module in pkgutil.walk_packages([str(ROOT)], "dpoptax.")]


def public_functions():
    names = {}
    for module_name in MODULES:
        if module_name.count(".") > 1 or "._" in module_name:
            continue
        for name, value in vars(importlib.import_module(module_name)).items():
            ours = inspect.isfunction(value) and value.__module__.startswith("dpoptax")
            if ours and not name.startswith("_") and "._" not in value.__module__:
                names[f"{value.__module__}.{value.__qualname__}"] = value
    return names


def classes_with_examples():
    samplers = vars(dpoptax.samplers).items()
    return {"Plan": dpoptax.Plan} | {
        name: value
        for name, value in samplers
        if inspect.isclass(value) and not hasattr(value, "_fields") and name != "Sampler"
    }


@pytest.mark.parametrize("name", sorted(public_functions() | classes_with_examples()))
def test_public_docstrings_have_args_returns_and_an_example_that_runs(name):
    value = (public_functions() | classes_with_examples())[name]
    doc = inspect.getdoc(value)
    assert doc, "no docstring"
    assert ">>>" in doc, "no example that runs"
    if inspect.isfunction(value):
        assert "Args:" in doc or not inspect.signature(value).parameters
        assert "Returns:" in doc


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_goes_in_and_what_comes_out(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__doc__[0].isupper()


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


def test_a_module_never_bears_the_name_of_a_public_function_beside_it():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and inspect.isfunction(value):
                assert f"{name}.{attribute}" not in MODULES


def test_the_package_is_typed_and_knows_its_version():
    assert (ROOT / "py.typed").exists()
    assert dpoptax.__version__.count(".") >= 2

"""Imports point one way, and each outside interface is touched in one file."""

import ast
import pathlib
import subprocess
import sys

import pytest

import dpoptax

ROOT = pathlib.Path(dpoptax.__file__).parent

# From the bottom to the top: each part may import what stands before it.
ORDER = [
    "_pytree",
    "_package_classes",
    "_jax_compat",
    "_explicit_axes",
    "_foreign_names",
    "_validate",
    "_json_text",
    "_masked_examples",
    "_precision",
    "_markers",
    "_call_stack",
    "relations",
    "schedules",
    "_serialize",
    "_dp_events",
    "_patterns",
    "random",
    "samplers",
    "per_example",
    "clipping",
    "mechanisms",
    "transforms",
    "accounting",
    "_plan_arguments",
    "_plan",
    "_suggest",
    "_correlated_plan",
    "reports",
    "_attacks",
    "training",
    "vi",
    "synthetic",
    "audit",
    "nnx",
    "keras",
    "tunix",
    "compat",
    "_command_line_errors",
    "_command_line",
    "__main__",
]
PATHS = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
# Imported where they are used, so that `import dpoptax` stays quick.
HEAVY = [
    "blackjax",
    "dp_accounting",
    "flax",
    "keras",
    "matplotlib",
    "mbi",
    "numpyro",
    "orbax",
    "scipy.stats",
]
HEAVY += ["tqdm", "tunix"]


def part_of(path):
    """The file or package, directly below `dpoptax`, that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(tree):
    """Every part that is imported anywhere in a file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "dpoptax":
                yield name.split(".")[1] if "." in name else "dpoptax"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = ORDER.index(part_of(path))
    for part in imported_parts(ast.parse(path.read_text())):
        if part != part_of(path):
            assert part in ORDER[:own], f"{part_of(path)} must not import {part}"


def test_an_upward_import_is_seen():
    upward = ast.parse("def f():\n    from dpoptax.training._fit import fit")
    assert list(imported_parts(upward)) == ["training"]
    assert "training" not in ORDER[: ORDER.index("accounting")]


def test_every_part_has_a_place_in_the_order():
    assert {part_of(path) for path in PATHS} == set(ORDER)


def users_of(predicate):
    return {
        str(path.relative_to(ROOT))
        for path in PATHS
        if any(predicate(node) for node in ast.walk(ast.parse(path.read_text())))
    }


def test_one_file_touches_what_jax_does_not_keep_stable():
    def unstable(node):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        return any(
            name.startswith(("jax.extend", "jax._src", "jax.interpreters")) for name in names
        )

    assert users_of(unstable) <= {"_jax_compat.py"}


def test_one_file_touches_private_attributes_of_dp_accounting():
    private = {"_pmf_remove", "_pmf_add", "_probs", "_lower_loss", "_infinity_mass", "_rounded_pmf"}

    def touches(node):
        return isinstance(node, ast.Attribute) and node.attr in private

    assert users_of(touches) == {"accounting/_dp_accounting_compat.py"}


def test_trees_have_the_type_that_pyright_knows():
    def takes_that_of_jaxtyping(node):
        return (
            isinstance(node, ast.ImportFrom)
            and node.module == "jaxtyping"
            and "PyTree" in [alias.name for alias in node.names]
        )

    assert users_of(takes_that_of_jaxtyping) == {"_pytree.py"}


def loaded_by(statement):
    """The heavy libraries that a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(ast.literal_eval(done.stdout))


@pytest.mark.e2e
def test_importing_the_package_loads_no_heavy_library():
    assert loaded_by("import jax, optax, dpoptax") == loaded_by("import jax, optax")


@pytest.mark.e2e
def test_training_privately_loads_accounting_and_nothing_else():
    use = "dpoptax.privatize, dpoptax.per_example_grads, dpoptax.samplers.Poisson, dpoptax.Plan"
    needed = loaded_by("import jax, optax, dp_accounting")
    assert loaded_by(f"import jax, optax, dpoptax; {use}") == needed

"""Lists the public names of the package, for tests and for the reference of the documentation."""

import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
from typing import Any

import dpoptax

ROOT = pathlib.Path(dpoptax.__file__).parent
MODULES = ["dpoptax"] + [module.name for module in pkgutil.walk_packages([str(ROOT)], "dpoptax.")]
PUBLIC_MODULES = [
    name for name in MODULES if not any(part.startswith("_") for part in name.split("."))
]
# These import NumPyro, which is optional.
NEED_NUMPYRO = (
    "dpoptax.vi.numpyro",
    *(f"dpoptax.compat.d3p.{name}" for name in ("gmm", "modelling", "svi")),
)


def public_names() -> dict[str, Any]:
    """Returns every public value by the shortest path to it, without modules."""
    found: dict[str, Any] = {}
    for module_name in PUBLIC_MODULES:
        if module_name.startswith(NEED_NUMPYRO) and not has_numpyro():
            continue
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not inspect.ismodule(value) and not any(value is other for other in found.values()):
                found[f"{module_name}.{name}"] = value
    return found


def has_numpyro() -> bool:
    """Returns whether NumPyro is installed, on which some names depend."""
    return importlib.util.find_spec("numpyro") is not None


def documented_names() -> dict[str, Any]:
    """Returns the functions and classes of `public_names`."""
    names = public_names().items()
    return {
        name: value for name, value in names if inspect.isfunction(value) or inspect.isclass(value)
    }

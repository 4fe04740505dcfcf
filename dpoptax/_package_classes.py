"""Whether a class is one of an installed package, and not one that only says so."""

import sys
from typing import Any


def is_of_package(cls: type, package: str) -> bool:
    """Whether a class is found under its name in a module of a package.

    A class may state any module. So it is looked up there.
    """
    module = cls.__module__
    if module.split(".")[0] != package:
        return False
    found: Any = sys.modules.get(module)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is cls

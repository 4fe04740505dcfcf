"""The lines of the program that made an equation."""

import contextlib
import pathlib
from typing import Any

from dpoptax._jax_compat import frames_of

_PACKAGE = str(pathlib.Path(__file__).parents[1])
# The standard library, whose decorators may call functions.
_LIBRARY = str(pathlib.Path(contextlib.__file__).parent)
_MARKERS = str(pathlib.Path(__file__).parents[1] / "_markers.py")


def line_of(eqn: Any) -> str:
    """Returns "file:line (function)" of the innermost call outside of installed libraries."""
    frames = frames_of(eqn)
    own = [one for one in frames if "site-packages" not in one[0] and not one[0].startswith("<")]
    outside = [one for one in own if not one[0].startswith(_PACKAGE)]
    # Code of this package alone, such as a step of `make_train_step`, is named where it begins.
    for file, line, function in [*outside[:1], *own[-1:]][:1]:
        path = pathlib.Path(file)
        here = pathlib.Path.cwd()
        short = path.relative_to(here) if path.is_relative_to(here) else path
        return f"{short}:{line} ({function})"
    return ""


def is_marked_by_package(eqn: Any) -> bool:
    """Whether a function of this package called the function that made a marker.

    Programs may call any function. A marker stands for code of this package only where that code
    made it. The method `sample` of a sampler marks itself.
    """
    frames = [(file, name) for file, _, name in frames_of(eqn)]
    files = [file for file, _ in frames]
    if _MARKERS not in files:
        return False
    for file, name in frames[files.index(_MARKERS) :]:
        if file == _MARKERS and name.endswith("marked"):
            return True
        if file != _MARKERS and not _is_between(file):
            return file.startswith(_PACKAGE)
    return False


def _is_between(file: str) -> bool:
    """Whether a file belongs to libraries that stand between two functions of this package."""
    library = "site-packages" in file or file.startswith((_LIBRARY, "<"))
    return library and not file.startswith(_PACKAGE)

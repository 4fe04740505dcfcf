"""The line of the user's program that made an equation."""

import pathlib
from typing import Any

from dpoptax._jax_compat import frames_of

_PACKAGE = str(pathlib.Path(__file__).parents[1])


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

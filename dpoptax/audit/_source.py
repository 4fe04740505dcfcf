"""The line of the user's program that made an equation."""

import pathlib
from typing import Any

from dpoptax._jax_compat import frames_of

_PACKAGE = str(pathlib.Path(__file__).parents[1])


def where(eqn: Any) -> str:
    """Returns "file:line (function)" of the innermost call outside of installed libraries."""
    frames = frames_of(eqn)
    own = [one for one in frames if "site-packages" not in one[0] and not one[0].startswith("<")]
    outside = [one for one in own if not one[0].startswith(_PACKAGE)]
    # Code of this package alone, such as a step of `make_train_step`, has a line here only.
    for file, line, function in [*outside, *own][:1]:
        return f"{file}:{line} ({function})"
    return "unknown line"

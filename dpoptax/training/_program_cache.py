"""Memory of compiled programs, so that a second run of the same program does not compile again.

Each run makes its own functions, and JAX would compile each of them again. Here a function is known
by its lowered program, with all constants. So it does not matter which objects a loss or an
optimizer is made of, and a loss that reads a changed global variable is another program.
"""

import collections
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from dpoptax.training._resume.fingerprint import says_all

# A few: each keeps a compiled program, and what the loss captured, alive.
MAX_PROGRAMS = 16
_programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
Function = TypeVar("Function", bound=Callable[..., Any])


def known_program(function: Function, *arguments: Any) -> Function:
    """Returns a function that was jitted before and is the same program, or else this function.

    Args:
        function: a jitted function.
        arguments: what it will be called with; later calls may have other values, and the same
            shapes and types.
    """
    jitted: Any = function
    text = jitted.lower(*arguments).as_text()
    if not says_all(text):
        return function
    name = (hashlib.sha256(text.encode()).digest(), jax.tree.structure(arguments))
    found = _programs.setdefault(name, function)
    _programs.move_to_end(name)
    if len(_programs) > MAX_PROGRAMS:
        _programs.popitem(last=False)
    return found

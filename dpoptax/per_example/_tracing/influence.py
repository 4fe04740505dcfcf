"""Influence in a jaxpr: which inputs can change an output, with or without a derivative.

A forward pass over the equations. Every value carries the set of inputs that it depends on, as the
bits of an integer. The pass never misses a dependence: an equation that it does not know passes on
all inputs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpoptax import _jax_compat

# Equations with floating-point outputs whose derivative is zero everywhere.
_NO_DERIVATIVE = {"stop_gradient", "floor", "ceil", "round", "sign", "nextafter"}
_CUSTOM_DERIVATIVE = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}

Equation = Any
# Called with each equation and the influences on its inputs.
Watch = Callable[[Equation, list[int]], None]


class Influence:
    """Follows inputs through a jaxpr.

    Attributes:
        by_derivative: follow only dependences that have a derivative: not through integers,
            `stop_gradient`, or a custom derivative that is zero.
        watch: called with each equation and the influences on its inputs.
        is_complete: False once there was a side effect, such as a write to a reference: a value
            may then depend on more than was found.
    """

    def __init__(self, *, by_derivative: bool, watch: Watch | None = None) -> None:
        self.by_derivative = by_derivative
        self.is_complete = True
        self._watch = watch
        # By equation; the equation is kept, so that its id stays its own.
        self._pullbacks: dict[int, tuple[Equation, list[int]]] = {}

    def outputs(self, jaxpr: Any, inputs: Sequence[int]) -> list[int]:
        """Returns the influences on the outputs, from those on the inputs after the constants."""
        variables, constants = _jax_compat.inputs_of(jaxpr)
        environment = dict(zip(variables, [*[0] * len(constants), *inputs], strict=True))

        def read(atom: Any) -> int:
            return 0 if _jax_compat.is_literal(atom) else environment[atom]

        for eqn in jaxpr.eqns:
            found = [read(atom) for atom in eqn.invars]
            if self._watch is not None:
                self._watch(eqn, found)
            if any("Debug" not in str(effect) for effect in eqn.effects):
                self.is_complete = False
            results = self._equation(eqn, found) if any(found) or self._watch else None
            for number, variable in enumerate(eqn.outvars):
                kept = results is not None and self._carries(variable)
                environment[variable] = results[number] if results is not None and kept else 0
        return [read(atom) for atom in jaxpr.outvars]

    def _carries(self, variable: Any) -> bool:
        if not self.by_derivative:
            return True
        dtype = getattr(variable.aval, "dtype", None)
        # A reference has no dtype of its own in some JAX versions: follow it.
        return dtype is None or jnp.issubdtype(dtype, jnp.inexact)

    def _equation(self, eqn: Equation, found: list[int]) -> list[int]:
        params, name = eqn.params, eqn.primitive.name
        if (jaxpr := _jax_compat.called_jaxpr(eqn)) is not None:
            return self.outputs(jaxpr, found)
        if (checkpoint := _jax_compat.checkpoint_params(eqn)) is not None:
            return self.outputs(checkpoint["jaxpr"], found)
        if eqn.primitive is jax.lax.scan_p:
            consts, carried = _jax_compat.scan_counts(eqn)
            return self._repeat(params["jaxpr"], found, consts, carried)
        if eqn.primitive is jax.lax.while_p:
            return self._while(eqn, found)
        if eqn.primitive is jax.lax.cond_p and len(found) == 1 + _num_inputs(params["branches"][0]):
            branches = [self.outputs(branch, found[1:]) for branch in params["branches"]]
            chosen = 0 if self.by_derivative else found[0]
            return [chosen | _union(results) for results in zip(*branches, strict=True)]
        if self.by_derivative:
            if name in _NO_DERIVATIVE:
                return [0] * len(eqn.outvars)
            if name in _CUSTOM_DERIVATIVE:
                return self._custom(eqn, found)
        return [_union(found)] * len(eqn.outvars)

    def _repeat(self, body: Any, found: list[int], consts: int, carried: int) -> list[int]:
        """The outputs of a loop: what enters the carry in one step is there in the next ones."""
        constants, carry, slices = (
            found[:consts],
            found[consts:][:carried],
            found[consts + carried :],
        )
        while True:
            results = self.outputs(body, [*constants, *carry, *slices])
            grown = [old | new for old, new in zip(carry, results, strict=False)]
            if grown == carry:
                return [*carry, *results[carried:]]
            carry = grown

    def _while(self, eqn: Equation, found: list[int]) -> list[int]:
        num_cond, num_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        cond, rest = found[:num_cond], found[num_cond:]
        carry = self._repeat(eqn.params["body_jaxpr"], rest, num_body, len(rest) - num_body)
        if self.by_derivative:
            return carry
        # The condition decides how often the body runs, so it acts on all outputs.
        (ends,) = self.outputs(eqn.params["cond_jaxpr"], [*cond, *carry])
        return [ends | value for value in carry]

    def _custom(self, eqn: Equation, found: list[int]) -> list[int]:
        """The rule decides here, not the function: we ask JAX for the pullback of the equation."""
        if id(eqn) not in self._pullbacks:
            self._pullbacks[id(eqn)] = eqn, _pullback_influence(eqn)
        _, reached = self._pullbacks[id(eqn)]
        return [
            _union(bits for bits, outputs in zip(found, reached, strict=True) if outputs >> i & 1)
            for i in range(len(eqn.outvars))
        ]


def _pullback_influence(eqn: Equation) -> list[int]:
    """By input of an equation, the outputs whose cotangents reach its cotangent, as bits."""
    inputs, outputs = ([atom.aval for atom in atoms] for atoms in (eqn.invars, eqn.outvars))
    # The first inputs are arrays that the function closes over: JAX refuses to differentiate them.
    closed_over = eqn.params.get("num_consts", 0)
    moving = [
        i
        for i, aval in enumerate(inputs)
        if i >= closed_over and jnp.issubdtype(aval.dtype, jnp.inexact)
    ]
    results = [i for i, aval in enumerate(outputs) if jnp.issubdtype(aval.dtype, jnp.inexact)]

    def pull(values: list[Any], cotangents: list[Any]) -> list[Any]:
        def run(*floats: Any) -> list[Any]:
            merged = list(values)
            for i, value in zip(moving, floats, strict=True):
                merged[i] = value
            computed = _jax_compat.bind(eqn, merged)
            return [computed[i] for i in results]

        return list(jax.vjp(run, *(values[i] for i in moving))[1](cotangents))

    closed = jax.make_jaxpr(pull)(inputs, [outputs[i] for i in results])
    jaxpr, constants = _jax_compat.split_constants(closed)
    entering = [*[0] * (len(constants) + len(inputs)), *(1 << i for i in results)]
    # The rule may round a cotangent or take its sign, so every dependence counts.
    influence = Influence(by_derivative=False)
    pulled = influence.outputs(jaxpr, entering)
    if not influence.is_complete:
        pulled = [_union(entering)] * len(pulled)
    reached = dict(zip(moving, pulled, strict=True))
    return [reached.get(i, 0) for i in range(len(inputs))]


def _num_inputs(jaxpr: Any) -> int:
    variables, constants = _jax_compat.inputs_of(jaxpr)
    return len(variables) - len(constants)


def _union(influences: Any) -> int:
    total = 0
    for bits in influences:
        total |= bits
    return total

"""An `nnx.Optimizer` that takes per-example gradients."""

from typing import Any

import jax
import optax
from flax import nnx

from dpoptax._pytree import PyTree
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.transforms._private import takes_gradients_at_params
from dpoptax.transforms._privatize import PrivatizeState

_MAX_NAMES = 3


class Optimizer(nnx.Optimizer[Any]):  # type: ignore[misc]
    """An `nnx.Optimizer` whose `update` takes per-example gradients.

    The gradients are those that `dpoptax.per_example_grads` returns for the loss and the parameters
    of `dpoptax.nnx.loss_fn`. All else is as in `nnx.Optimizer`.

    Args:
        model: the model.
        tx: `privatize`, chained with an optimizer.
        wrt: which Variables to train; the same as for `loss_fn`.

    Raises:
        ValueError: `tx` does not hold `privatize`, or it takes the gradients at another point than
            the parameters, as `dpoptax.transforms.disk` does. From `update`: the gradients are not
            per example, or they are of other Variables than `wrt` says.

    Example:
        >>> import dpoptax, jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(100, 4),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> tx = optax.chain(plan.privatize(jax.random.key(0)), optax.adam(1e-3))
        >>> optimizer = Optimizer(model, tx, wrt=nnx.Param)
        >>> loss_fn, params = dpoptax.nnx.loss_fn(model, lambda model, x: jnp.sum(model(x) ** 2))
        >>> grads = dpoptax.per_example_grads(loss_fn)(params, jnp.ones((8, 3)))
        >>> updates = optimizer.update(model, grads)
        >>> int(optimizer.step[...])
        1
    """

    def __init__(
        self, model: nnx.Module, tx: optax.GradientTransformation, *, wrt: Any, graph: Any = None
    ) -> None:
        structures: list[Any] = []
        if not takes_gradients_at_params(tx):
            raise ValueError(
                "expected an optimizer whose gradients are taken at the parameters of the model; "
                "got disk, which takes them elsewhere. Use dpoptax.transforms.low_pass, or "
                "dpoptax.training.fit."
            )

        def init(params: PyTree) -> optax.OptState:
            state = tx.init(params)
            if not any(map(_is_private, jax.tree.leaves(state, is_leaf=_is_private))):
                raise ValueError(
                    "tx must hold privatize, which clips and adds noise; got a transformation "
                    "without it. Pass optax.chain(plan.privatize(key), optimizer). If nothing here "
                    "is private, use nnx.Optimizer."
                )
            structures.append(jax.tree.structure(state))
            return state

        # NNX keeps the state without the types of the Variables. `update` needs them again, since
        # the gradients have them.
        super().__init__(model, optax.GradientTransformation(init, tx.update), wrt=wrt, graph=graph)
        self.tx = tx
        self.structure: Any = structures[0]

    def update(self, model: Any, grads: PyTree, /, **kwargs: Any) -> optax.Updates:
        """Clips, adds noise and updates the model in place; see `privatize`.

        Args:
            model: the model that the optimizer was made for.
            grads: `PerExampleGrads`, or an `nnx.State` of arrays with a leading example axis.
            kwargs: further arguments of `tx.update`.

        Returns:
            The updates, which were added to the parameters.

        Raises:
            ValueError: as the class says.
        """
        params = nnx.state(model, self.wrt, graph=self.graph)
        _refuse_other_variables(grads, params, self.wrt)
        leaves = jax.tree.leaves(nnx.as_pure(self.opt_state))
        opt_state = jax.tree.unflatten(self.structure, leaves)
        # The types of the Variables are those of the parameters, as in the gradients.
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads, opt_state, params, **nnx.as_pure(kwargs)
        )
        nnx.update(model, optax.apply_updates(params, updates))
        nnx.update(self.opt_state, nnx.state(nnx.as_pure(opt_state), graph=self.graph))
        self.step[...] += 1
        return updates


def _is_private(node: Any) -> bool:
    return isinstance(node, PrivatizeState)


def _refuse_other_variables(grads: PyTree, params: nnx.State, wrt: Any) -> None:
    """Refuses gradients that do not cover the Variables of the optimizer, or cover others."""
    found = _names(as_per_example_grads(grads).parameter_specs())
    expected = _names(params)
    if found == expected:
        return
    names = expected - found or found - expected
    got = "gradients of parameters that the optimizer leaves out"
    if expected - found:
        got = "trainable parameters without gradients, so that the plan does not clip them"
    shown = ", ".join(sorted(names)[:_MAX_NAMES])
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    raise ValueError(
        f"expected gradients of all Variables that the optimizer trains, wrt={wrt!r}, and of no "
        f"others; got {got}: {shown}{more}. Pass the same wrt to dpoptax.nnx.loss_fn and to the "
        "optimizer."
    )


def _names(tree: PyTree) -> set[str]:
    """The paths of the arrays in a state, as `layers.0.kernel`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    }

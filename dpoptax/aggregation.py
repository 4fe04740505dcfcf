"""Per-example gradients in, one private gradient out: clip, sum, noise, divide.

    release = (sum_i weight_i g_i + noise_multiplier * l2_clip * N(0, I)) / expected_batch_size

in that order, once, in float32 or wider (Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with
the public expected batch size in place of the realised one).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from dpoptax import _checks
from dpoptax.clipping import ClipRule, as_clip_rule, noise_stddev
from dpoptax.noise import add_gaussian
from dpoptax.per_example import as_per_example_grads
from dpoptax.schedules import Scheduled, at, checked


class PrivatizeState(NamedTuple):
    """What the next release needs: how many there were, and the key of this run's noise."""

    step: Int[Array, ""]
    key: PRNGKeyArray


def privatize(
    clip: ClipRule | Scheduled,
    noise_multiplier: Scheduled | optax.Schedule,
    expected_batch_size: Scheduled | optax.Schedule,
    key: PRNGKeyArray,
) -> optax.GradientTransformation:
    """Clips, sums, noises and normalises per-example gradients, as an Optax transformation.

    Put it first in `optax.chain`; what follows sees a private gradient of the mean loss, shaped
    and typed like the parameters. It takes `PerExampleGrads` or a plain tree of arrays with a
    leading example axis.

    The noise of step t of the n-th `init` is drawn from a key of its own, derived from `key`, so
    that neither two steps nor two runs of one transformation share noise. A second transformation
    made with the same `key` repeats the first: give every run its own key. The count of `init`
    calls is taken when `init` is traced: a jitted `init` called twice gives one state twice.

    Args:
        clip: a clip rule such as `dpoptax.clipping.flat(1.0)`, or a float as its short form.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
        expected_batch_size: the public normaliser, sampling_rate times num_examples; never the
            number of examples that a batch happened to have. Clip, noise and size may each be a
            `dpoptax.schedules.Piecewise`, read at the number of the release; an Optax schedule
            becomes one by `dpoptax.schedules.tabulate`, so that it can be accounted.
        key: a typed PRNG key for noise and nothing else.

    Returns:
        An `optax.GradientTransformation` with a `PrivatizeState`.

    Raises:
        TypeError: an argument of the wrong kind, an old-style key among them.
        ValueError: a bound that is not positive, negative noise, or noise without a finite bound.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.zeros(2)}
        >>> tx = optax.chain(privatize(1.0, 1.1, 2, jax.random.key(0)), optax.sgd(0.1))
        >>> state = tx.init(params)
        >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}  # two examples
        >>> updates, state = tx.update(grads, state, params)
        >>> updates["w"].shape
        (2,)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    rule = as_clip_rule(clip)
    noise = checked("noise_multiplier", noise_multiplier, _checks.non_negative)
    noise_stddev(rule, noise)
    size = checked("expected_batch_size", expected_batch_size, _checks.positive)
    root = _checks.typed_key("key", key)
    runs = itertools.count()

    def init(params: PyTree) -> PrivatizeState:
        del params
        return PrivatizeState(
            step=jnp.zeros((), jnp.int32), key=jax.random.fold_in(root, next(runs))
        )

    def update(
        updates: PyTree, state: PrivatizeState, params: PyTree | None = None
    ) -> tuple[PyTree, PrivatizeState]:
        grads = as_per_example_grads(updates, params)
        specs = grads.parameter_specs()
        next_state = PrivatizeState(step=state.step + 1, key=state.key)
        if not jax.tree.leaves(specs):
            return specs, next_state
        total = grads.clip_and_sum(functools.partial(rule.weights, step=state.step))
        stddev = noise_stddev(rule, noise, state.step)
        noisy = add_gaussian(jax.random.fold_in(state.key, state.step), total, stddev)
        divisor = at(size, state.step)
        release = jax.tree.map(
            lambda leaf, spec: (leaf / jnp.asarray(divisor, leaf.dtype)).astype(spec.dtype),
            noisy,
            specs,
        )
        return release, next_state

    return optax.GradientTransformation(init, update)

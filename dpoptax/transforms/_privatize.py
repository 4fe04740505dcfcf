"""Per-example gradients in, one private gradient out: clip, sum, noise, divide.

    release = (sum_i weight_i g_i + noise_multiplier * l2_clip * N(0, I)) / expected_batch_size

in that order, once, in float32 or wider (Abadi et al. 2016, arXiv:1607.00133, algorithm 1, with
the public expected batch size in place of the realised one).
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from dpoptax import _serialize, _validate
from dpoptax.clipping import ClipRule
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.mechanisms import Gaussian, Mechanism
from dpoptax.per_example import as_per_example_grads
from dpoptax.random._derive import derive_key
from dpoptax.random._reuse_guard import Claim
from dpoptax.random._threefry_unrolled import unrolled
from dpoptax.schedules import Scheduled, at, checked, extremes


class PrivatizeState(NamedTuple):
    """What the next release needs: how many there were, and the key of this run's noise."""

    step: Int[Array, ""]
    key: PRNGKeyArray


def privatize(
    clip: ClipRule | Scheduled,
    noise_multiplier: Scheduled | optax.Schedule,
    *,
    expected_batch_size: Scheduled | optax.Schedule,
    key: PRNGKeyArray,
    mechanism: Mechanism = Gaussian(),
) -> optax.GradientTransformation:
    """Clips, sums, noises and normalises per-example gradients, as an Optax transformation.

    Put it first in `optax.chain`; what follows sees a private gradient of the mean loss, shaped
    and typed like the parameters. It takes `PerExampleGrads` or a plain tree of arrays with a
    leading example axis.

    The noise of step t of the n-th `init` is drawn from a key of its own, derived from `key` and
    from what is released: clip, noise, size, mechanism and the shapes of the parameters. Neither
    two steps nor two runs of one transformation share noise, and a saved state goes on bit for bit,
    but draws other noise if it is restored into a changed transformation. What cannot be seen from
    here is yours to keep apart: one key in two runs one after the other, other data or another
    learning rate under a restored state, a jitted `init` called twice, which gives one state, and
    `jax.vmap` of `init`, which gives all members of an ensemble one key: call `init` for each of
    them, and stack the states.

    Args:
        clip: a clip rule such as `dpoptax.clipping.FlatClip(1.0)`, or a float as its short form.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound.
        expected_batch_size: the public normaliser, sampling_rate times num_examples; never the
            number of examples that a batch happened to have. Clip, noise and size may each be a
            `dpoptax.schedules.Schedule`, read at the number of the release; an Optax schedule
            becomes one by `dpoptax.schedules.tabulate`, so that it can be accounted.
        key: a typed PRNG key for noise and nothing else.
        mechanism: how the noise is made, `dpoptax.mechanisms.DiscreteGaussian()` for one that trusts no
            floating point; normal draws by default.

    Returns:
        An `optax.GradientTransformation` with a `PrivatizeState`.

    Raises:
        TypeError: an argument of the wrong kind, an old-style key among them.
        ValueError: a bound that is not positive, negative noise, or noise without a finite bound;
            when used, a key that serves another transformation of the same chain.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.zeros(2)}
        >>> tx = optax.chain(privatize(1.0, 1.1, expected_batch_size=2, key=jax.random.key(0)), optax.sgd(0.1))
        >>> state = tx.init(params)
        >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}  # two examples
        >>> updates, state = tx.update(grads, state, params)
        >>> updates["w"].shape
        (2,)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    rule = as_clip_rule(clip)
    noise = checked("noise_multiplier", noise_multiplier, _validate.non_negative)
    mechanism.check(rule, noise)
    size = checked("expected_batch_size", expected_batch_size, _validate.positive)
    root = _validate.typed_key("key", key)
    runs = itertools.count()
    claim = Claim(root)
    identity = [
        _serialize.encode_or_describe(rule),
        _serialize.encode_or_describe(noise),
        _serialize.encode_or_describe(size),
        repr(mechanism),
    ]

    def init(params: PyTree) -> PrivatizeState:
        del params
        claim.begin()
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
        if extremes(noise) != (0.0, 0.0):
            claim.use()
        shapes = [
            (jax.tree_util.keystr(path), spec.shape, spec.dtype.name)
            for path, spec in jax.tree_util.tree_leaves_with_path(specs)
        ]
        key = derive_key(unrolled(state.key), f"{identity} {shapes}")
        key = jax.random.fold_in(key, state.step)
        noisy = mechanism.release(key, grads, rule, noise, state.step)
        divisor = at(size, state.step)
        release = jax.tree.map(
            lambda leaf, spec: (leaf / jnp.asarray(divisor, leaf.dtype)).astype(spec.dtype),
            noisy,
            specs,
        )
        return release, next_state

    return optax.GradientTransformation(init, update)

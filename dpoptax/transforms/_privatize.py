"""The private Optax transformation: clip, sum, add noise, divide.

    release = (sum_i weight_i g_i + noise_multiplier * l2_clip * N(0, I)) / expected_batch_size

These steps happen once, in this order, in float32 or wider. This is algorithm 1 of Abadi et al.
2016 (arXiv:1607.00133), with the public expected batch size instead of the realised one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from dpoptax import _markers, _validate
from dpoptax._explicit_axes import (
    run_with_automatic_axes,
    sharded_by_example,
    sharded_like,
)
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._pytree import PyTree
from dpoptax.clipping._flat import as_clip_rule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism, NoiseKeys, release_key
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._stacked import as_per_example_grads
from dpoptax.random._allowed_keys import allowed_key
from dpoptax.random._derive import fingerprint
from dpoptax.random._reuse_guard import KeyReuseGuard, is_placeholder
from dpoptax.schedules import ScalarOrSchedule, as_schedule, validated
from dpoptax.transforms import _position
from dpoptax.transforms._private import PrivateTransformation
from dpoptax.transforms._release import ReleaseState, SumRelease


class PrivatizeState(NamedTuple):
    """What the next release needs. It holds a key, so keep it secret.

    Attributes:
        step: the number of the next release, int32.
        key: the key of this run's noise; the same in every step.
        clip_state: the state of a clip rule that has one, such as
            `dpoptax.clipping.QuantileClip`; else empty. It is part of what was released.
        mechanism_state: the state of a mechanism that has one, such as
            `dpoptax.mechanisms.Correlated`; else empty. It is as secret as the key.

    Example:
        >>> import jax
        >>> tx = privatize(1.0, 1.1, expected_batch_size=2, key=jax.random.key(0))
        >>> int(tx.init({"w": jax.numpy.zeros(2)}).step)
        0
    """

    step: Int[Array, ""]
    key: PRNGKeyArray
    clip_state: PyTree = ()
    mechanism_state: PyTree = ()

    def __repr__(self) -> str:
        """Leaves out what is secret, which must not appear in logs and error messages."""
        clip = f", clip_state={self.clip_state}" if jax.tree.leaves(self.clip_state) else ""
        secret = ", mechanism_state=<not shown>" if jax.tree.leaves(self.mechanism_state) else ""
        return f"PrivatizeState(step={self.step}, key=<not shown>{clip}{secret})"


@answer_foreign_names
def privatize(
    clip: AnyClipRule | ScalarOrSchedule,
    noise_multiplier: ScalarOrSchedule | optax.Schedule,
    *,
    expected_batch_size: ScalarOrSchedule | optax.Schedule,
    key: PRNGKeyArray,
    mechanism: AnyMechanism = Gaussian(),
) -> optax.GradientTransformation:
    """Clips, sums, noises and normalises per-example gradients, as an Optax transformation.

    Put it first in `optax.chain`, and do not wrap it in another transformation: what is computed
    before the clip is not private. The transformations after it see a private gradient of the mean
    loss, with the shapes and types of the parameters. The updates are `PerExampleGrads`, or a tree
    of arrays with a leading example axis. `update` needs the parameters too, to check that.

    **One transformation is one run. For a second run, call `privatize` again with another key.**
    Each step takes the state that the step before returned. Two different releases from one state
    would share their noise.

    `init` is a pure function: its state holds a key derived from `key`. The noise of a step is
    derived from that key, from what is released (clip, noise, size, mechanism and the shapes of the
    parameters) and from the number of the step. So a saved state continues bit for bit, and draws
    other noise if you restore it into a changed transformation. An `init` inside
    `jax.jit`, `jax.lax.scan` or `jax.vmap` cannot be counted, so each call of such a function is
    the same run: make the transformation inside that function, from a key that is an argument.
    `docs/safety.md` lists the mistakes that the library cannot see.

    Args:
        clip: a clip rule such as `dpoptax.clipping.FlatClip(1.0)`, or a number as its short form.
        noise_multiplier: standard deviation of the noise on the sum, divided by the clip bound. For
            a clip rule with state it is that of the whole step, and the sum gets a little more.
        expected_batch_size: the public normaliser, sampling_rate times num_examples; never the
            number of examples that a batch happens to have. Clip, noise and size may each be a
            `dpoptax.schedules.Schedule`, evaluated at the number of the release. Convert an Optax
            schedule by `dpoptax.schedules.tabulate`, so that it can be accounted.
        key: a typed PRNG key, for the noise of this run and nothing else.
        mechanism: how the noise is drawn: `dpoptax.mechanisms.Gaussian()`, or
            `dpoptax.mechanisms.DiscreteGaussian()`, which needs no trust in floating point, or
            `dpoptax.mechanisms.Correlated(strategy)`.

    Returns:
        An `optax.GradientTransformation` with a `PrivatizeState`.

    Raises:
        TypeError: an argument has the wrong type, for example a key that is not a typed Threefry or
            ChaCha key.
        ValueError: the bound is not positive, the noise is negative, the batch size is below 1 as a
            sampling rate is, or there is noise without a finite bound. From `init` or `update`: a
            second run of this transformation in this process, another transformation with the same
            key in the same chain, another release from the same state, a transformation of Optax
            around or before this one, a function that is mapped over devices, no parameters, or
            gradients that are not per example.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> params = {"w": jnp.zeros(2)}
        >>> tx = optax.chain(
        ...     privatize(1.0, 1.1, expected_batch_size=2, key=jax.random.key(0)), optax.sgd(0.1)
        ... )
        >>> state = tx.init(params)
        >>> grads = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}  # two examples
        >>> updates, state = tx.update(grads, state, params)
        >>> updates["w"].shape
        (2,)

    Reference: Abadi et al. 2016, arXiv:1607.00133, algorithm 1.
    """
    _position.refuse_wrapper()
    _position.refuse_array("clip", clip)
    _position.refuse_array("noise_multiplier", noise_multiplier)
    _position.refuse_array("expected_batch_size", expected_batch_size)
    rule = as_clip_rule(clip)
    noise = validated("noise_multiplier", noise_multiplier, _validate.non_negative)
    size = validated("expected_batch_size", expected_batch_size, _validate.batch_size)
    sum_release = SumRelease(rule, noise, size, mechanism)
    root = allowed_key("key", key)
    # Without noise there is none to draw twice.
    guard = KeyReuseGuard(root) if as_schedule(noise).max > 0 else None

    def init(params: PyTree) -> PrivatizeState:
        if not is_placeholder(params):
            _position.refuse_wrapper()
            _position.refuse_masked(params)
            sum_release.check_fits(params)
        first_key = jax.random.fold_in(root, 0)
        first = sum_release.init(params, first_key)
        state = PrivatizeState(jnp.zeros((), jnp.int32), first_key, first.clip, first.mechanism)
        if guard is not None:
            guard.on_init(state.key, params)
        return state

    def update(
        updates: PyTree, state: PrivatizeState, params: PyTree | None = None, **_: Any
    ) -> tuple[PyTree, PrivatizeState]:
        _position.refuse_wrapper()
        _position.refuse_follower()
        _position.refuse_masked((updates, params))
        _position.refuse_mapped_axes()
        grads = as_per_example_grads(updates, _required(params))
        specs = grads.parameter_specs()
        next_state = state._replace(step=state.step + 1)
        if not jax.tree.leaves(specs):
            return specs, next_state
        if guard is not None and not _markers.active():
            guard.on_update(state, next_state, grads)
        identity = f"{sum_release.identity};{fingerprint(_shapes(specs))}"
        keys = NoiseKeys(state.key, release_key(state.key, identity, state.step), identity)
        states = ReleaseState(state.clip_state, state.mechanism_state)
        noisy, states, step = _run_release(
            sum_release, keys, grads, states, state.step, params=params
        )
        next_state = PrivatizeState(step, state.key, states.clip, states.mechanism)
        # Dividing after the noise is post-processing. The divisor is public.
        divisor = as_schedule(size).at(state.step)
        release = _divided(noisy, divisor, specs)
        if guard is not None:
            guard.on_release(keys.current, (release, states.clip))
        return release, next_state

    def stddev(state: PrivatizeState, params: PyTree) -> PyTree:
        del params
        return sum_release.noise_stddev(state.clip_state, state.step)

    return PrivateTransformation(init, update, noise_stddev=stddev)


def _run_release(
    sum_release: SumRelease,
    keys: NoiseKeys,
    grads: PerExampleGrads,
    states: ReleaseState,
    step: Array,
    *,
    params: PyTree,
) -> tuple[PyTree, ReleaseState, Array]:
    """Returns the noisy sum, sharded like the parameters, the next states and the next step."""
    if _markers.active():
        return _markers.released(sum_release, keys.current, grads, states, step)

    def run(root: Array, current: Array, grads: PerExampleGrads, *rest: Any) -> Any:
        found = sum_release(NoiseKeys(root, current, keys.identity), grads, *rest)
        return *found, grads.readings()

    noisy, states, readings = run_with_automatic_axes(
        run,
        *(keys.root, keys.current, grads, states, step),
        specs_of=lambda results: (
            sharded_like(params)(results[0]),
            sharded_like(states)(results[1]),
            sharded_by_example(None, grads.mask)(results[2]),
        ),
    )
    # With explicit axes, it ran on a copy of the gradients, which found the losses.
    grads.remember(readings)
    return noisy, states, step + 1


def _divided(noisy: PyTree, divisor: float | Array, specs: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, spec: (leaf / jnp.asarray(divisor, leaf.dtype)).astype(spec.dtype),
        *(noisy, specs),
    )


def _shapes(specs: PyTree) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (jax.tree_util.keystr(path), spec.shape, spec.dtype.name)
        for path, spec in jax.tree_util.tree_leaves_with_path(specs)
    ]


def _required(params: PyTree | None) -> PyTree:
    if params is None:
        raise ValueError(
            "expected the parameters, to check that the gradients are per example; got None. Call "
            "tx.update(grads, state, params)."
        )
    return params

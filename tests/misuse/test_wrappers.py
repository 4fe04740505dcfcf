"""Misuse: `privatize` inside or after other transformations, or mapped over devices.

What is computed before the clip is not private. Each case is refused by one sentence, and what may
follow `privatize` goes on working.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
from jax.sharding import Mesh, PartitionSpec

import dpoptax

PARAMS = {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}
X = jnp.array([[1.0, 2.0], [-1.0, 0.5], [0.0, 3.0], [2.0, 2.0]])  # more than one microbatch
STACKED = {"w": jnp.ones((3, 2, 2)), "b": jnp.full((3, 2), 2.0)}
FIRST = "privatize must come first"


def private(seed=0, clip=1.0, noise_multiplier=1.0, size=3.0):
    return inspect.unwrap(dpoptax.privatize)(  # its own checks, not those of the tests
        clip, noise_multiplier, expected_batch_size=size, key=jax.random.key(seed)
    )


def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


def labels(name_of):
    return {"w": name_of("w"), "b": name_of("b")}


AROUND = {
    "partition": lambda: optax.partition({"w": private(0), "b": private(1)}, labels(str)),
    "multi_transform": lambda: optax.multi_transform(
        {"w": private(0), "b": optax.sgd(0.1)}, labels(str)
    ),
    "masked": lambda: optax.masked(private(), labels(lambda name: name == "w")),
    "masked, all leaves": lambda: optax.masked(private(), labels(bool)),
    "MultiSteps": lambda: optax.MultiSteps(optax.chain(private(), optax.sgd(0.1)), 2),
    "apply_if_finite": lambda: optax.apply_if_finite(private(), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(inspect.unwrap(dpoptax.privatize))(
        clip=1.0, noise_multiplier=1.0, expected_batch_size=3.0, key=jax.random.key(0)
    ),
    "inject_hyperparams, fixed noise": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(private(), optax.sgd(rate))
    )(rate=0.1),
    "flatten": lambda: optax.flatten(private()),
    "conditionally_transform": lambda: optax.conditionally_transform(
        private(), lambda step: step > 1
    ),
    "sam": lambda: optax.contrib.sam(private(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("how", [lambda init: init, jax.jit, lambda init: functools.partial(
    jax.eval_shape, init)], ids=["eager", "jit", "shapes"])  # fmt: skip
@pytest.mark.parametrize("name", AROUND)
def test_a_transformation_around_privatize_is_refused_at_init(name, how):
    outer = name.split(",")[0].replace("multi_transform", "partition")
    with pytest.raises(ValueError, match=f"first and outermost; got .* inside optax.{outer}"):
        how(AROUND[name]().init)(PARAMS)


def test_the_refusal_of_groups_names_per_group_clipping():
    with pytest.raises(
        ValueError, match=r"Per-group clipping.*GroupClip.*one privatize for the whole tree"
    ):
        AROUND["partition"]().init(PARAMS)


def test_a_transformation_around_privatize_is_refused_at_an_update_too():
    tx = private()
    around = optax.apply_if_finite(tx, 3)
    state = optax.ApplyIfFiniteState(*[jnp.zeros((), jnp.int32)] * 3, tx.init(PARAMS))
    with pytest.raises(ValueError, match=r"got privatize inside optax\.apply_if_finite"):
        around.update(STACKED, state, PARAMS)


def test_a_tree_with_masked_leaves_is_refused_whoever_masked_it():
    masked = PARAMS | {"b": optax.MaskedNode()}
    with pytest.raises(
        ValueError, match=r"see the whole tree; got a tree with an optax.MaskedNode"
    ):
        private().init(masked)
    with pytest.raises(ValueError, match=r"got a tree with an optax.MaskedNode"):
        private().update({"w": STACKED["w"], "b": masked["b"]}, private().init(PARAMS), masked)


BEFORE = {
    "scale": optax.scale(2.0),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "trace": optax.trace(0.9),
    "scale_by_adam": optax.scale_by_adam(),
    "zero_nans": optax.zero_nans(),
    "apply_if_finite": optax.apply_if_finite(optax.scale(1.0), 3),
    "MultiSteps": optax.MultiSteps(optax.scale(1.0), 2),
    "a user's own": optax.stateless(lambda grads, _: jax.tree.map(lambda g: g / 2, grads)),
}


@pytest.mark.parametrize("compile", [lambda update: update, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", BEFORE)
def test_a_transformation_before_privatize_is_refused(name, compile):
    tx = optax.chain(BEFORE[name], private())
    state = tx.init(PARAMS)
    grads = GRADS[registry.factored]
    with pytest.raises(ValueError, match=FIRST) as caught:
        compile(tx.update)(grads, state, PARAMS)
    assert f"optax.{name}," in str(caught.value) or "jax.tree.map" in str(caught.value)


GRADS = {form: form(loss)(PARAMS, X) for form in registry.FORMS.values()}


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("form", registry.FORMS.values(), ids=registry.FORMS)
def test_leaves_of_gradients_are_for_privatize_only(form):
    grads, tx = GRADS[form], private()
    for misuse in (
        lambda: jax.tree.map(jnp.add, grads, grads),
        lambda: jax.tree.map(lambda leaf: 2 * leaf, {"nested": grads}),
        lambda: optax.adam(0.1).update(grads, optax.adam(0.1).init(PARAMS), PARAMS),
        lambda: optax.tree.norm(grads),
    ):
        with pytest.raises(ValueError, match=FIRST):
            misuse()
    # Whoever takes the tree apart by hand changes the mask too.
    leaves, structure = jax.tree.flatten(grads)
    changed = jax.tree.unflatten(structure, [2.0 * leaf for leaf in leaves])
    with pytest.raises(ValueError, match="got a mask of float32"):
        tx.update(changed, tx.init(PARAMS), PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize("form", registry.FORMS.values(), ids=registry.FORMS)
def test_gradients_cross_the_transformations_of_jax(form):
    """As arguments, results, carries and in branches; with the same sums."""
    grads = GRADS[form]
    ones = jnp.ones(len(X))
    expected = grads.weighted_sum(ones)

    @jax.jit
    def cross(grads):
        carried, _ = jax.lax.scan(lambda grads, _: (grads, None), grads, None, length=2)
        return jax.lax.cond(True, lambda grads: grads, lambda grads: grads, carried)

    placed = jax.device_put(jax.block_until_ready(cross(grads)))
    assert registry.distance(placed.weighted_sum(ones), expected) == 0
    assert jax.tree.structure(placed) == jax.tree.structure(grads)
    assert jax.eval_shape(cross, grads).mask.shape == (len(X),)


def test_no_message_shows_a_gradient():
    for grads in GRADS.values():
        assert repr(grads) == f"<{type(grads).__name__}: per-example gradients, not private>"
        # JAX shows what it got instead of another structure.
        with pytest.raises(ValueError, match="not private") as caught:
            jax.tree.structure(PARAMS).flatten_up_to(grads)
        assert not re.search(r"\d\.\d", str(caught.value))
    state = private().init(PARAMS)
    assert repr(state) == "PrivatizeState(step=0, key=<not shown>)"


def test_one_privatize_after_another_is_refused():
    one, other = private(0), private(1)
    tx = optax.chain(one, other)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"first and outermost; got another transformation before"):
        jax.eval_shape(tx.update, STACKED, state, PARAMS)
    # Also without `optax.chain`, which shows the order.
    with pytest.raises(ValueError, match=r"shapes of the parameters.*private already"):
        jax.eval_shape(other.update, PARAMS, state[1], PARAMS)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("compile", [lambda update: update, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("name", sorted(BEFORE.keys() - {"MultiSteps"}))  # JAX refuses its shapes
def test_a_transformation_before_privatize_is_refused_for_plain_trees_too(name, compile):
    """Nothing in plain arrays shows what was done to them, but `optax.chain` shows the order."""
    first = BEFORE[name]
    for tx in (
        optax.chain(first, private()),
        optax.named_chain(("first", first), ("private", private())),
        optax.chain(first, optax.chain(private(), optax.sgd(0.1))),
    ):
        with pytest.raises(ValueError, match=r"first and outermost|shapes of the parameters"):
            compile(tx.update)(STACKED, tx.init(PARAMS), PARAMS)


AFTER = {
    "masked": lambda: optax.masked(optax.sgd(0.1), labels(lambda name: name == "w")),
    "partition": lambda: optax.partition({"w": optax.sgd(0.1), "b": optax.adam(0.1)}, labels(str)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "flatten": lambda: optax.flatten(optax.sgd(0.1)),
    "conditionally_mask": lambda: optax.conditionally_mask(optax.sgd(0.1), lambda step: step > 0),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(0.1),
    "add_decayed_weights": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    "ema": lambda: optax.chain(optax.ema(0.9), optax.scale(-0.1)),
    "named_chain": lambda: optax.named_chain(("sgd", optax.sgd(0.1))),
    "with_extra_args_support": lambda: optax.with_extra_args_support(optax.sgd(0.1)),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
}


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax's wrappers mix integers and floats
@pytest.mark.parametrize("name", AFTER)
def test_what_follows_privatize_may_be_any_transformation(name):
    """Without clip and noise, each gives what it gives for the mean gradient."""
    follows = AFTER[name]()
    tx = optax.chain(private(clip=np.inf, noise_multiplier=0.0), follows)
    mean = jax.tree.map(lambda leaf: leaf.mean(0), STACKED)
    state, plain = tx.init(PARAMS), follows.init(PARAMS)
    rest = {"value": 1.0} if name == "reduce_on_plateau" else {}
    for _ in range(2):
        updates, state = tx.update(STACKED, state, PARAMS, **rest)
        expected, plain = optax.with_extra_args_support(follows).update(mean, plain, PARAMS, **rest)
        assert registry.distance(updates, expected) < 1e-6


@jax.numpy_dtype_promotion("standard")
def test_lookahead_may_stand_around_it():
    """It passes gradients on, and has parameters of its own kind, so that it cannot follow."""
    tx = optax.lookahead(optax.chain(private(noise_multiplier=0.0), optax.sgd(0.1)), 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    updates, _ = tx.update(STACKED, tx.init(params), params)
    assert registry.global_norm(updates.fast) > 0


def test_numbers_from_inject_hyperparams_are_refused_by_name():
    for options in ({"clip": jnp.ones(())}, {"noise_multiplier": jnp.ones(())},
                    {"size": jnp.ones(())}):  # fmt: skip
        with pytest.raises(
            TypeError, match=r"must be a Python or NumPy number.*inject_hyperparams"
        ):
            private(**options)
    with pytest.raises(TypeError, match="inject_hyperparams"):
        jax.jit(lambda noise: private(noise_multiplier=noise).init(PARAMS))(1.0)
    private(clip=np.float32(1.0), noise_multiplier=np.float64(1.0), size=3)


def test_a_function_that_is_mapped_over_devices_is_refused():
    """Each device would add the same noise, and a sum over 8 devices would have it 8 times."""
    tx = private()
    state = tx.init(PARAMS)

    def update(grads):
        return tx.update(grads, state, PARAMS)[0]

    row = PartitionSpec("data")
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    for check_vma in (True, False):
        sharded = jax.shard_map(
            update, mesh=mesh, in_specs=row, out_specs=PartitionSpec(), check_vma=check_vma
        )
        with pytest.raises(ValueError, match=r"outside of jax.shard_map.*over the axes data"):
            sharded(STACKED)
        with pytest.raises(ValueError, match=r"outside of jax.shard_map.*over the axes data"):
            jax.jit(sharded)(STACKED)
    members = jax.tree.map(lambda leaf: leaf[None], STACKED)
    for mapped in (jax.pmap(update, axis_name="i"), jax.vmap(update, axis_name="i")):
        with pytest.raises(ValueError, match=r"outside of jax.shard_map.*over the axes i\."):
            mapped(members)

"""Law 8: no two releases share noise. The noise of runs, restarts and devices is compared.

Gradients of zero release nothing but noise, so a release is a record of what was drawn.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from eight_devices import run_on_eight_devices

import dpoptax
from dpoptax import mechanisms

PARAMS = {"a": jnp.zeros(64), "b": jnp.zeros((8, 8)), "c": jnp.zeros(())}
KEYS = {"threefry": jax.random.key, "chacha": dpoptax.random.insecure_key}
keys = pytest.mark.parametrize("make", KEYS.values(), ids=KEYS)


def transformation(key, clip=1.0, noise_multiplier=1.0, size=1.0, **options):
    return dpoptax.privatize(clip, noise_multiplier, expected_batch_size=size, key=key, **options)


def record(tx, state, num_steps, params=PARAMS):
    """Runs some steps; returns the state, and a row of noise for every leaf and step."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), params)
    update = jax.jit(tx.update)
    rows = []
    for _ in range(num_steps):
        noise, state = update(zeros, state, params)
        rows += [np.ravel(leaf) for leaf in jax.tree.leaves(noise)]
    return state, rows


def assert_unrelated(rows, sizes):
    """No row repeats a part of another, up to a factor."""
    long = np.stack([row / row.std() for row in rows if row.size > 1])
    correlations = np.corrcoef(long)[np.triu_indices(len(long), 1)]
    assert np.abs(correlations).max() < 5.5 / np.sqrt(long.shape[1])
    # A few of these float32 values agree by chance; all values of a shared draw would.
    values = np.concatenate(rows)
    assert len(np.unique(values)) >= len(values) - 2 - len(values) ** 2 // 2**22
    assert len(rows) == sizes
    assert abs(values.std() - 1) < 4.5 / np.sqrt(2 * len(values))


@keys
def test_steps_leaves_and_runs_draw_apart(make):
    rows = []
    for seed in range(3):
        for run in range(3):  # with the key that the refusal of a second run proposes
            key = jax.random.fold_in(make(seed), run) if run else make(seed)
            tx = transformation(key)
            rows += record(tx, tx.init(PARAMS), 4)[1]
    assert_unrelated(rows, 3 * 3 * 4 * 3)


CHANGES = {
    "clip": {"clip": 0.5},
    "noise": {"noise_multiplier": 2.0},
    "size": {"size": 2.0},
    "mechanism": {"mechanism": mechanisms.Gaussian(num_draws=2)},
    "exact": {"mechanism": mechanisms.DiscreteGaussian()},
}


def restored(state, path):
    """Saves a state and reads it back, as another process would."""

    def plain(leaf):
        return (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )

    implementation = jax.random.key_impl(state.key)
    with jax.numpy_dtype_promotion("standard"), ocp.StandardCheckpointer() as checkpointer:
        saved = jax.tree.map(plain, state)
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(path, jax.tree.map(jnp.zeros_like, saved))
    return found._replace(key=jax.random.wrap_key_data(found.key, impl=implementation))


@pytest.mark.slow
@keys
def test_a_restored_run_continues_bit_for_bit_and_a_changed_one_draws_other_noise(make, tmp_path):
    tx = transformation(make(0))
    state, before = record(tx, tx.init(PARAMS), 2)
    _, rest = record(tx, state, 2)
    state = restored(state, tmp_path / "state")
    _, again = record(transformation(make(1)), state, 2)  # the key is the state's
    for row, other in zip(rest, again, strict=True):
        np.testing.assert_array_equal(row, other)
    rows = before + rest
    for change in CHANGES.values():
        changed = transformation(make(0), **change)
        scale = change.get("clip", 1) * change.get("noise_multiplier", 1) / change.get("size", 1)
        rows += [row / scale for row in record(changed, state, 2)[1]]
    more = PARAMS | {"d": jnp.zeros(64)}  # a model with one leaf more
    rows += record(tx, state, 2, more)[1]
    assert_unrelated(rows, 2 * 3 * (2 + len(CHANGES)) + 2 * 4)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dpoptax
assert jax.device_count() == 8
mesh = Mesh(np.array(jax.devices()), ("x",))
rows = {}
for name, make in {"threefry": jax.random.key, "chacha": dpoptax.random.insecure_key}.items():
    for batch, model in ((P(), P()), (P("x"), P()), (P(), P("x"))):
        tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=1.0, key=make(0), mechanism=MECHANISM)
        params = jax.device_put(jnp.zeros(4096), NamedSharding(mesh, model))
        grads = jax.device_put(jnp.zeros((8, 4096)), NamedSharding(
            mesh, P(None, "x") if model else batch))
        noise, _ = jax.jit(tx.update, out_shardings=(params.sharding, None))(
            grads, tx.init(params), params)
        assert noise.sharding.is_equivalent_to(params.sharding, 1)
        rows.setdefault(name, []).append(np.asarray(noise))
for name, found in rows.items():
    for row in found[1:]:
        np.testing.assert_array_equal(row, found[0])
    parts = np.corrcoef(found[0].reshape(8, 512))[np.triu_indices(8, 1)]
    assert np.abs(parts).max() < 5 / np.sqrt(512), parts
    assert abs(found[0].std() - 1) < 4.5 / np.sqrt(2 * 4096)
print("one noise on one and on eight")
"""


@pytest.mark.e2e
@pytest.mark.parametrize("mechanism", ["Gaussian()", "DiscreteGaussian(bits=12)"])
def test_eight_devices_draw_what_one_draws_and_no_part_of_it_twice(mechanism):
    program = DEVICES.replace("MECHANISM", f"dpoptax.mechanisms.{mechanism}")
    assert "one noise on one and on eight" in run_on_eight_devices(program)


def combined(first, second):
    """A hand-made transformation: one part for leaf a, the other for the rest."""

    def parts(tree):
        return {"a": tree["a"]}, {name: leaf for name, leaf in tree.items() if name != "a"}

    def init(params):
        return tuple(tx.init(part) for tx, part in zip((first, second), parts(params), strict=True))

    def update(grads, state, params):
        both = zip((first, second), parts(grads), state, parts(params), strict=True)
        (one, first_state), (other, second_state) = [tx.update(*rest) for tx, *rest in both]
        return one | other, (first_state, second_state)

    return optax.GradientTransformation(init, update)


@pytest.mark.slow
@keys
def test_one_key_for_two_transformations_of_one_chain_is_refused(make):
    zeros = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), PARAMS)
    tx = combined(transformation(make(0)), transformation(make(0), clip=2.0))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"given one key.*Split the key"):
        jax.jit(tx.update)(zeros, state, PARAMS)
    tx = combined(transformation(make(0)), transformation(make(1)))
    jax.jit(tx.update)(zeros, tx.init(PARAMS), PARAMS)
    # Without noise there is none to share. One run after another may be a repetition.
    quiet = [transformation(make(0), noise_multiplier=0.0) for _ in range(2)]
    tx = combined(*quiet)
    tx.update(zeros, tx.init(PARAMS), PARAMS)
    for _ in range(2):
        tx = transformation(make(5))
        tx.update(zeros, tx.init(PARAMS), PARAMS)


ZEROS = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), PARAMS)
SECOND_RUN = r"a second run would draw the same noise.*fold_in\(key, 1\).*jax.eval_shape"
TWO_STATES = r"got 2 before this update.*same noise.*fold_in\(key, 1\)"


def key_data(state):
    return jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ),
        state,
    )


def assert_equal(tree, other):
    for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(leaf, expected)


@keys
def test_init_is_pure(make):
    tx = transformation(make(0))
    states = [tx.init(PARAMS), jax.jit(tx.init)(PARAMS), tx.init(PARAMS)]
    states += [transformation(make(0), clip=3.0).init(PARAMS), transformation(make(0)).init(None)]
    for state in states[1:]:
        assert_equal(key_data(state), key_data(states[0]))
    assert int(states[0].step) == 0
    assert bool(states[0].key == jax.random.fold_in(make(0), 0))


@keys
def test_tracing_init_changes_nothing(make):
    """Also between two updates, and with parameters that are captured and no argument."""

    def trace(tx):
        jax.eval_shape(tx.init, PARAMS)
        jax.eval_shape(lambda: tx.init(PARAMS))
        jax.jit(tx.init)(PARAMS)
        jax.jit(tx.init).lower(PARAMS).compile()

    expected = record(plain := transformation(make(0)), plain.init(PARAMS), 2)[1]
    tx = transformation(make(0))
    trace(tx)
    state, found = record(tx, tx.init(PARAMS), 1)
    trace(tx)
    found += record(tx, state, 1)[1]
    assert_equal(found, expected)


def jitted(tx):
    return jax.jit(tx.update)


def eager(tx):
    return tx.update


def abstract(tx):
    return lambda *arguments: jax.eval_shape(tx.update, *arguments)


modes = pytest.mark.parametrize("mode", [jitted, eager, abstract])


@modes
def test_two_states_of_one_transformation_are_refused_at_the_update(mode):
    tx = transformation(jax.random.key(0))
    first, second = tx.init(PARAMS), tx.init(PARAMS)
    for state in (first, second):
        with pytest.raises(ValueError, match=TWO_STATES):
            mode(tx)(ZEROS, state, PARAMS)


@modes
def test_init_after_an_update_is_refused(mode):
    tx = transformation(jax.random.key(0))
    mode(tx)(ZEROS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=SECOND_RUN):
        tx.init(PARAMS)
    # The run itself continues, and the shapes of its state can still be asked for.
    mode(tx)(ZEROS, jax.jit(tx.init)(PARAMS), PARAMS)
    jax.eval_shape(tx.init, PARAMS)


def test_states_that_were_copied_are_refused_though_the_first_arrays_are_gone():
    tx = transformation(jax.random.key(0))
    members = [jax.tree.map(lambda leaf: leaf[None], tx.init(PARAMS)) for _ in range(2)]
    ensemble = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *members)
    del members
    with pytest.raises(ValueError, match=TWO_STATES):
        jax.vmap(tx.update, (None, 0, None))(ZEROS, ensemble, PARAMS)


@keys
def test_an_ensemble_takes_one_transformation_with_its_own_key_per_member(make):
    txs = [transformation(jax.random.fold_in(make(0), member)) for member in range(3)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[tx.init(PARAMS) for tx in txs])
    noise, _ = jax.jit(jax.vmap(txs[0].update, (None, 0, None)))(ZEROS, states, PARAMS)
    rows = [np.ravel(row) for leaf in jax.tree.leaves(noise) for row in leaf]
    assert_unrelated(rows, 3 * 3)


def test_a_compiled_update_may_come_before_init_but_no_second_run():
    """Tools compile a step from shapes alone, before there is a state."""
    tx = transformation(jax.random.key(0))
    step = jax.jit(tx.update).lower(ZEROS, jax.eval_shape(tx.init, PARAMS), PARAMS).compile()
    step(ZEROS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=SECOND_RUN):
        tx.init(PARAMS)


def test_a_state_may_be_replaced_by_a_restored_one(tmp_path):
    tx = transformation(jax.random.key(0))
    state, rows = record(tx, tx.init(PARAMS), 2)
    saved = restored(state, tmp_path / "state")
    _, expected = record(tx, state, 2)
    again = transformation(jax.random.key(0))
    template = again.init(PARAMS)
    state = jax.tree.map(lambda _, leaf: leaf, template, saved)
    found = record(again, state, 2)[1]
    assert_equal(found, expected)
    assert_unrelated(rows + found, 4 * 3)


def wrappers():
    private = transformation
    return {
        "chain": lambda key: optax.chain(private(key), optax.scale(1.0)),
        "named chain": lambda key: optax.named_chain(("private", private(key))),
        "multi_transform": lambda key: optax.chain(
            private(key),
            optax.multi_transform(
                {"slow": optax.scale(0.1), "fast": optax.scale(1.0)},
                {"a": "slow", "b": "fast", "c": "fast"},
            ),
        ),
        "masked": lambda key: optax.chain(
            private(key), optax.masked(optax.scale(1.0), {"a": True, "b": False, "c": True})
        ),
        "MultiSteps": lambda key: optax.chain(
            private(key), optax.MultiSteps(optax.scale(1.0), 2).gradient_transformation()
        ),
        "inject_hyperparams": lambda key: optax.chain(
            private(key), optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
        ),
        "with_extra_args": lambda key: optax.with_extra_args_support(private(key)),
    }


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")  # Optax's wrappers mix integers and floats
@pytest.mark.parametrize("wrap", wrappers().values(), ids=wrappers())
def test_wrappers_of_optax_start_one_run_and_no_second(wrap):
    tx = wrap(jax.random.key(0))
    jax.eval_shape(tx.init, PARAMS)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(ZEROS, state, PARAMS)
        # To map a function over a state, Optax calls `init` with a placeholder.
        optax.tree_map_params(tx, lambda leaf: leaf, state)
    with pytest.raises(ValueError, match=SECOND_RUN):
        tx.init(PARAMS)


def test_one_transformation_for_two_parts_is_refused():
    tx = transformation(jax.random.key(0))
    both = combined(tx, tx)
    with pytest.raises(ValueError, match=TWO_STATES):
        both.update(ZEROS, both.init(PARAMS), PARAMS)


@pytest.mark.slow
def test_train_states_and_optimizers_of_flax_start_one_run_each():
    from flax import nnx
    from flax.training.train_state import TrainState

    tx = transformation(jax.random.key(0))
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads=ZEROS))
    assert int(step(step(state)).opt_state.step) == 2
    with pytest.raises(ValueError, match=SECOND_RUN):
        TrainState.create(apply_fn=None, params=PARAMS, tx=tx)

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    tx = transformation(jax.random.key(1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)), nnx.state(model, nnx.Param))
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(model, optimizer, grads)
    with pytest.raises(ValueError, match=SECOND_RUN):
        nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.slow
def test_what_a_transformation_cannot_repeat_is_not_refused():
    quiet = transformation(jax.random.key(0), noise_multiplier=0.0)
    for _ in range(2):
        quiet.update(ZEROS, quiet.init(PARAMS), PARAMS)
    empty = transformation(jax.random.key(0))
    for _ in range(2):
        empty.update({}, empty.init({}), {})

    @jax.vmap  # a traced key: its value is unknown, and so is how often this runs
    def run(key):
        tx = transformation(key)
        return tx.update(ZEROS, tx.init(PARAMS), PARAMS)[0]["a"]

    rows = np.asarray(run(jax.random.split(jax.random.key(0), 2)))
    assert abs(np.corrcoef(rows)[0, 1]) < 4.5 / np.sqrt(64)


def test_one_run_after_another_with_one_key_is_a_repetition():
    first, second = (transformation(jax.random.key(0)) for _ in range(2))
    state, rows = record(first, first.init(PARAMS), 2)
    _, again = record(second, second.init(PARAMS), 2)
    assert_equal(again, rows)
    record(first, state, 1)  # the first run may continue


def test_one_key_for_two_transformations_is_refused_also_if_init_is_jitted():
    tx = combined(transformation(jax.random.key(0)), transformation(jax.random.key(0), clip=2.0))
    with pytest.raises(ValueError, match=r"given one key"):
        jax.jit(tx.update)(ZEROS, jax.jit(tx.init)(PARAMS), PARAMS)


def test_init_after_a_draw_is_refused_also_if_the_first_state_came_from_jit():
    params = jnp.zeros(3)
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=1, key=jax.random.key(0))
    tx.update(jnp.ones((1, 3)), jax.jit(tx.init)(params), params)
    with pytest.raises(ValueError, match="another call of init after an update"):
        tx.init(params)


def test_a_program_may_be_compiled_before_its_first_state_is_made():
    params = jnp.zeros(3)
    tx = dpoptax.privatize(1.0, 1.0, expected_batch_size=1, key=jax.random.key(0))
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update).lower(jnp.ones((1, 3)), state, params).compile()
    updates, _ = step(jnp.ones((1, 3)), tx.init(params), params)
    assert bool(jnp.isfinite(updates).all())

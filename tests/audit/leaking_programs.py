"""Programs that leak private data, each in one way. None of them may be certified."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dpoptax
from dpoptax.samplers import Batch, take

N, WIDTH = 60, 3
SAMPLER = dpoptax.samplers.Poisson(N, 6, 16)
DATA = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
LABELS = np.arange(N, dtype=np.int32) % 4
PROGRAMS: dict[str, Any] = {}


class State(NamedTuple):
    params: Any
    opt_state: Any
    sampler_state: Any
    key: Any


def privatize(clip=1.0, noise=1.1, key=1):
    return dpoptax.privatize(clip, noise, expected_batch_size=6, key=jax.random.key(key))


def initial(tx=None):
    params = {"w": jnp.zeros(WIDTH)}
    tx = TX if tx is None else tx
    keys = jax.random.split(jax.random.key(5))
    return State(params, tx.init(params), SAMPLER.init(keys[0]), keys[1])


TX = optax.chain(privatize(), optax.sgd(0.1, momentum=0.9))
KEY = jax.random.key(77)
LOOSE = privatize(clip=np.inf, noise=0.0)
QUIET = privatize(noise=0.0)
DATASET = {"x": DATA, "y": LABELS}


def loss(params, row):
    return jnp.sum((params["w"] - row["x"]) ** 2)


def sample(s, data):
    sampler_state, batch = SAMPLER.sample(s.sampler_state)
    return s._replace(sampler_state=sampler_state), batch, take(data, batch)


def gradients(params, taken, loss_fn=loss, **kwargs):
    return dpoptax.per_example_grads(loss_fn)(params, taken, **kwargs)


def apply(s, grads, tx=None):
    updates, opt_state = (TX if tx is None else tx).update(grads, s.opt_state, s.params)
    return s._replace(params=optax.apply_updates(s.params, updates), opt_state=opt_state)


def honest(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken))


def leaks(program):
    PROGRAMS[program.__name__] = program
    return program


# What is returned


@leaks
def returns_the_loss(s, data):
    s, _, taken = sample(s, data)
    losses, grads = dpoptax.value_and_per_example_grads(loss)(s.params, taken)
    return apply(s, grads), jnp.mean(losses)


@leaks
def returns_the_mask(s, data):
    s, batch, taken = sample(s, data)
    return apply(s, gradients(s.params, taken)), batch.mask


@leaks
def returns_the_indices(s, data):
    s, batch, taken = sample(s, data)
    return apply(s, gradients(s.params, taken)), batch.indices


@leaks
def returns_the_batch_size(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken)), jnp.sum(taken.mask)


@leaks
def returns_a_shuffled_column(s, data):
    order = jax.random.permutation(jax.random.key(3), N)
    return honest(s, data), data["x"][order]


@leaks
def returns_the_labels(s, data):
    return honest(s, data), jnp.max(data["y"])


@leaks
def returns_the_most_common_label(s, data):
    counts = jnp.zeros(4, jnp.int32).at[data["y"]].add(1)
    return honest(s, data), jnp.argmax(counts)


@leaks
def returns_gradient_norms(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    return apply(s, grads), grads.global_squared_norms()


@leaks
def returns_the_clipped_sum(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    return apply(s, grads), grads.weighted_sum(jnp.ones(len(grads.mask)) / 100)


@leaks
def returns_whether_all_are_finite(s, data):
    return honest(s, data), jnp.all(jnp.isfinite(data["x"]))


@leaks
def returns_the_words_of_the_sampling_key(s, data):
    return honest(s, data), jax.random.key_data(s.sampler_state.key)


@leaks
def returns_the_words_of_the_noise_key(s, data):
    return honest(s, data), jax.random.key_data(s.opt_state[0].key)


@leaks
def returns_a_draw_from_the_sampling_key(s, data):
    sampler_state = s.sampler_state
    (key, _) = sampler_state.keys(2)
    return honest(s, data), jax.random.normal(key, (20,))


@leaks
def returns_an_aux_output(s, data):
    s, _, taken = sample(s, data)
    with_aux = lambda params, row: (loss(params, row), row["x"])  # noqa: E731
    fn = dpoptax.value_and_per_example_grads(with_aux, has_aux=True)
    (_, aux), grads = fn(s.params, taken)
    return apply(s, grads), aux


# What changes the parameters


@leaks
def adds_the_batch_mean(s, data):
    s, _, taken = sample(s, data)
    s = apply(s, gradients(s.params, taken))
    mean = jnp.mean(taken.examples["x"], axis=0)
    return s._replace(params={"w": s.params["w"] + 1e-3 * mean})


@leaks
def adds_a_raw_gradient(s, data):
    mean_loss = lambda params: jnp.mean((data["x"] @ params["w"] - 1.0) ** 2)  # noqa: E731
    raw = jax.grad(mean_loss)(s.params)
    s = honest(s, data)
    return s._replace(params=optax.apply_updates(s.params, raw))


@leaks
def scales_the_update_by_the_gradient_norm(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    after = apply(s, grads)
    rate = 1 / jnp.sqrt(jnp.sum(grads.global_squared_norms()))
    params = jax.tree.map(lambda new, old: old + rate * (new - old), after.params, s.params)
    return after._replace(params=params)


@leaks
def divides_by_the_realised_batch_size(s, data):
    s, _, taken = sample(s, data)
    after = apply(s, gradients(s.params, taken))
    size = jnp.maximum(jnp.sum(taken.mask, dtype=jnp.float32), 1)
    params = jax.tree.map(lambda new, old: old + 6 * (new - old) / size, after.params, s.params)
    return after._replace(params=params)


@leaks
def trains_a_head_without_clip(s, data):
    s, _, taken = sample(s, data)
    head = jnp.mean(jnp.where(taken.mask[:, None], taken.examples["x"], 0), axis=0)
    s = apply(s, gradients(s.params, taken))
    return s, {"head": head}


@leaks
def stops_early_by_the_loss(s, data):
    s, _, taken = sample(s, data)
    losses, grads = dpoptax.value_and_per_example_grads(loss)(s.params, taken)
    after = apply(s, grads)
    return jax.lax.cond(jnp.mean(losses) > 0.1, lambda: after, lambda: s)


@leaks
def selects_the_update_by_the_loss(s, data):
    s, _, taken = sample(s, data)
    losses, grads = dpoptax.value_and_per_example_grads(loss)(s.params, taken)
    after = apply(s, grads)
    better = jnp.mean(losses) > 0.1
    return after._replace(
        params=jax.tree.map(lambda a, b: jnp.where(better, a, b), after.params, s.params)
    )


@leaks
def loops_until_the_loss_is_small(s, data):
    def loss_of(s):
        return jnp.mean((data["x"] - s.params["w"]) ** 2)

    return jax.lax.while_loop(lambda s: loss_of(s) > 0.1, lambda s: honest(s, data), s)


@leaks
def counts_steps_until_the_loss_is_small(s, data):
    level = jnp.mean(data["x"] ** 2)
    count = jax.lax.while_loop(lambda i: i * 0.1 < level, lambda i: i + 1, 0)
    return honest(s, data), count


@leaks
def carries_a_sum_through_a_scan(s, data):
    def body(carry, _):
        s, total = carry
        s, _, taken = sample(s, data)
        s = apply(s, gradients(s.params, taken))
        return (s, total + jnp.sum(taken.examples["x"])), None

    return jax.lax.scan(body, (s, 0.0), None, length=3)[0]


@leaks
def scans_over_the_examples(s, data):
    total, _ = jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(WIDTH), data["x"])
    return honest(s, data), total


@leaks
def reads_data_in_the_optimizer(s, data):
    mean = jnp.mean(data["x"], axis=0)
    s = honest(s, data)
    momentum = jax.tree.map(lambda leaf: leaf + mean, s.opt_state[1])
    return s._replace(opt_state=(s.opt_state[0], momentum))


@leaks
def keeps_the_last_batch(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken)), taken.examples


# What decides the gradients


@leaks
def centres_by_the_batch(s, data):
    s, _, taken = sample(s, data)
    mean = jnp.mean(taken.examples["x"], axis=0)
    centred = {"x": taken.examples["x"] - mean, "y": taken.examples["y"]}
    return apply(s, gradients(s.params, centred, mask=taken.mask))


@leaks
def centres_by_all_data(s, data):
    centred = {"x": data["x"] - jnp.mean(data["x"], axis=0), "y": data["y"]}
    return honest(s, centred)


@leaks
def couples_examples_through_a_captured_mean(s, data):
    s, _, taken = sample(s, data)
    mean = jnp.mean(taken.examples["x"])

    def coupled(params, row):
        return loss(params, row) * mean

    return apply(s, gradients(s.params, taken, coupled))


@leaks
def captures_the_batch_in_the_loss(s, data):
    s, _, taken = sample(s, data)

    def contrastive(params, row):
        return jnp.sum(jax.nn.logsumexp(taken.examples["x"] @ (params["w"] * row["x"])))

    return apply(s, gradients(s.params, taken, contrastive))


@leaks
def captures_the_data_set_in_the_loss(s, data):
    def pulled(params, row):
        return loss(params, row) + jnp.sum((params["w"] - jnp.asarray(DATA).mean(0)) ** 2)

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, pulled))


@leaks
def captures_a_transposed_column(s, data):
    flipped = jnp.asarray(np.ascontiguousarray(DATA.T))
    return honest(s, data), jnp.sum(flipped)


@leaks
def captures_some_rows(s, data):
    few = jnp.asarray(DATA[5:8])
    s = honest(s, data)
    return s._replace(params={"w": s.params["w"] + few.sum(0)})


@leaks
def hides_the_data_in_a_custom_derivative(s, data):
    constant = jnp.asarray(DATA)

    @jax.custom_vjp
    def square(x):
        return jnp.sum(x**2)

    square.defvjp(lambda x: (square(x), x), lambda x, g: (g * (x + constant.mean(0)),))

    def hidden(params, row):
        return square(params["w"] - row["x"])

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, hidden))


@leaks
def takes_gradients_at_private_parameters(s, data):
    s, _, taken = sample(s, data)
    point = {"w": s.params["w"] + jnp.mean(data["x"], axis=0)}
    return apply(s, gradients(point, taken))


@leaks
def normalises_gradients_by_the_batch(s, data):
    s, _, taken = sample(s, data)
    stacked = gradients(s.params, taken).stacked()
    scaled = jax.tree.map(lambda g: g / jnp.std(g), stacked)
    return apply(s, scaled)


@leaks
def repeats_the_batch_mean(s, data):
    s, _, taken = sample(s, data)
    stacked = gradients(s.params, taken).stacked()
    mean = jax.tree.map(lambda g: jnp.broadcast_to(g.mean(0), g.shape), stacked)
    return apply(s, mean)


@leaks
def shifts_gradients_between_rows(s, data):
    s, _, taken = sample(s, data)
    stacked = gradients(s.params, taken).stacked()
    return apply(s, jax.tree.map(lambda g: g + jnp.roll(g, 1, axis=0), stacked))


@leaks
def mixes_two_batches(s, data):
    s, _, first = sample(s, data)
    s, _, second = sample(s, data)
    grads = jax.tree.map(
        jnp.add, gradients(s.params, first).stacked(), gradients(s.params, second).stacked()
    )
    return apply(s, grads)


@leaks
def sums_rows_of_different_lengths(s, data):
    s, _, taken = sample(s, data)
    stacked = gradients(s.params, taken).stacked()
    pairs = jax.tree.map(lambda g: g.reshape(8, 2, *g.shape[1:]).sum(1), stacked)
    return apply(s, pairs)


@leaks
def drops_the_mask(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken.examples))


@leaks
def replaces_the_mask(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken.examples, mask=jnp.ones(16, bool)))


# What decides who is in a batch


@leaks
def gathers_every_row_twice(s, data):
    s, batch, _ = sample(s, data)
    twice = Batch(batch.indices // 2 * 2, batch.mask)
    return apply(s, gradients(s.params, take(data, twice)))


@leaks
def gathers_with_replacement(s, data):
    key, draw = jax.random.split(s.key)
    indices = jax.random.randint(draw, (16,), 0, N)
    taken = take(data, Batch(indices, jnp.ones(16, bool)))
    return apply(s._replace(key=key), gradients(s.params, taken))


@leaks
def samples_by_the_data(s, data):
    chances = jax.nn.softmax(jnp.sum(data["x"], axis=1))
    indices = jnp.argsort(-chances)[:16].astype(jnp.int32)
    return apply(s, gradients(s.params, take(data, Batch(indices, jnp.ones(16, bool)))))


@leaks
def steps_the_sampler_by_the_data(s, data):
    step = jnp.sum(data["y"]).astype(jnp.int32)
    s = s._replace(sampler_state=s.sampler_state._replace(step=step))
    return honest(s, data)


@leaks
def indexes_without_take(s, data):
    s, batch, _ = sample(s, data)
    rows = jax.tree.map(lambda leaf: jnp.asarray(leaf)[batch.indices], data)
    return apply(s, gradients(s.params, rows, mask=batch.mask))


@leaks
def gathers_from_sorted_columns(s, data):
    return honest(s, {"x": jnp.sort(data["x"], axis=0), "y": data["y"]})


@leaks
def uses_one_batch_for_two_releases(s, data):
    s, _, taken = sample(s, data)
    s = apply(s, gradients(s.params, taken))
    return apply(s, gradients(s.params, taken))


@leaks
def draws_the_same_batch_twice(s, data):
    before = s.sampler_state
    s = honest(s, data)
    return honest(s._replace(sampler_state=before), data)


@leaks
def never_advances_the_sampler(s, data):
    return honest(s, data)._replace(sampler_state=s.sampler_state)


@leaks
def draws_one_batch_in_all_iterations(s, data):
    def body(carry, _):
        after = honest(carry, data)
        return after._replace(sampler_state=carry.sampler_state), None

    return jax.lax.scan(body, s, None, length=3)[0]


# Clip and noise


@leaks
def has_no_noise(s, data):
    s, _, taken = sample(s, data)
    updates, _ = QUIET.update(gradients(s.params, taken), QUIET.init(s.params), s.params)
    return s._replace(params=optax.apply_updates(s.params, updates))


@leaks
def has_no_clip(s, data):
    s, _, taken = sample(s, data)
    updates, _ = LOOSE.update(gradients(s.params, taken), LOOSE.init(s.params), s.params)
    return s._replace(params=optax.apply_updates(s.params, updates))


@leaks
def returns_the_old_noise_state(s, data):
    return honest(s, data)._replace(opt_state=s.opt_state)


@leaks
def uses_one_noise_for_two_batches(s, data):
    before = s.opt_state
    s = honest(s, data)
    return honest(s._replace(opt_state=before), data)


@leaks
def uses_one_noise_in_all_iterations(s, data):
    def body(carry, _):
        after = honest(carry, data)
        return after._replace(opt_state=s.opt_state), None

    return jax.lax.scan(body, s, None, length=3)[0]


@leaks
def resets_the_noise_in_all_iterations(s, data):
    def body(carry, _):
        after = honest(carry, data)
        private, *rest = after.opt_state
        private = private._replace(step=jnp.zeros_like(private.step))
        return after._replace(opt_state=(private, *rest)), None

    return jax.lax.scan(body, s, None, length=3)[0]


@leaks
def derives_the_noise_from_the_data(s, data):
    private, *rest = s.opt_state
    seed = jnp.sum(data["y"]).astype(jnp.uint32)
    private = private._replace(key=jax.random.fold_in(private.key, seed))
    return honest(s._replace(opt_state=(private, *rest)), data)


@leaks
def numbers_the_release_by_the_data(s, data):
    private, *rest = s.opt_state
    private = private._replace(step=jnp.sum(data["y"]).astype(jnp.int32))
    return honest(s._replace(opt_state=(private, *rest)), data)


@leaks
def makes_the_noise_from_a_constant(s, data):
    tx = dpoptax.privatize(1.0, 1.1, expected_batch_size=6, key=jax.random.key(9))
    s, _, taken = sample(s, data)
    updates, _ = tx.update(gradients(s.params, taken), tx.init(s.params), s.params)
    return s._replace(params=optax.apply_updates(s.params, updates))


@leaks
def draws_from_the_key_of_the_noise(s, data):
    shown = jax.random.normal(s.opt_state[0].key, (64,))
    return honest(s, data), shown


@leaks
def bounds_by_the_median_norm(s, data):
    s, _, taken = sample(s, data)
    stacked = gradients(s.params, taken).stacked()
    bound = jnp.median(jnp.abs(stacked["w"]))
    scaled = jax.tree.map(lambda g: g / bound, stacked)
    after = apply(s, scaled)
    return after._replace(params=jax.tree.map(lambda w: w * bound, after.params))


@leaks
def adds_its_own_noise_without_a_clip(s, data):
    key, draw = jax.random.split(s.key)
    total = jnp.sum(data["x"], axis=0) + jax.random.normal(draw, (WIDTH,))
    return honest(s._replace(key=key), data), total


# Ways out that are not outputs


@leaks
def prints_the_loss(s, data):
    jax.debug.print("{}", jnp.mean(data["x"]))
    return honest(s, data)


@leaks
def prints_in_the_loss(s, data):
    def printed(params, row):
        jax.debug.print("{}", row["x"])
        return loss(params, row)

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, printed))


@leaks
def calls_the_host(s, data):
    spec = jax.ShapeDtypeStruct((), np.float32)
    shift = jax.pure_callback(lambda: np.float32(DATA.mean()), spec)
    s = honest(s, data)
    return s._replace(params={"w": s.params["w"] + shift})


@leaks
def calls_the_host_in_the_loss(s, data):
    def called(params, row):
        spec = jax.ShapeDtypeStruct((), np.float32)
        same = jax.pure_callback(
            lambda x: np.float32(x), spec, row["x"][0], vmap_method="sequential"
        )
        return loss(params, row) + jax.lax.stop_gradient(same)

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, called))


@leaks
def writes_to_the_host(s, data):
    jax.experimental.io_callback(lambda x: None, None, jnp.sum(data["x"]))
    return honest(s, data)


@leaks
def calls_a_foreign_function(s, data):
    call = jax.ffi.ffi_call("some_target", jax.ShapeDtypeStruct((WIDTH,), np.float32))
    return honest(s, data), call(s.params["w"])


# A fault of two parts


@leaks
def hides_a_leak_in_a_jitted_function(s, data):
    @jax.jit
    def inner(x):
        return jax.checkpoint(jax.jit(jnp.mean))(x)

    return honest(s, data), inner(data["x"])


@leaks
def scales_one_leaf_of_the_optimizer_state(s, data):
    s, _, taken = sample(s, data)
    after = apply(s, gradients(s.params, taken))
    size = jnp.sum(taken.mask, dtype=jnp.float32)
    state = jax.tree.map(
        lambda leaf: leaf * size if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        after.opt_state,
    )
    return after._replace(opt_state=state)


@leaks
def privatizes_means_of_microbatches(s, data):
    s, _, taken = sample(s, data)
    halves = taken.examples["x"].reshape(2, 8, WIDTH)
    mean_loss = lambda w, rows: jnp.mean((rows - w) ** 2)  # noqa: E731
    grads = jax.vmap(jax.grad(mean_loss), in_axes=(None, 0))(s.params["w"], halves)
    return apply(s, {"w": grads})


@leaks
def releases_only_if_the_batch_is_full(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    return jax.lax.cond(jnp.sum(taken.mask) > 3, lambda: apply(s, grads), lambda: s)


@leaks
def couples_examples_by_a_rule_for_vmap(s, data):
    @jax.custom_batching.custom_vmap
    def own(x):
        return x

    @own.def_vmap
    def couple(axis_size, in_batched, x):
        return x + jnp.mean(x, axis=0), True

    coupled = lambda params, row: jnp.sum(params["w"] * own(row["x"]))  # noqa: E731
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, coupled))


@leaks
def sums_rows_of_several_iterations(s, data):
    def body(carry, _):
        carry, _, taken = sample(carry, data)
        masked = jnp.where(taken.mask[:, None], taken.examples["x"], 0.0)
        return carry, masked

    s, rows = jax.lax.scan(body, s, None, length=3)
    return apply(s, {"w": jnp.sum(rows, axis=0)})


@leaks
def carries_rows_into_the_next_iteration(s, data):
    def body(carry, _):
        s, rows = carry
        s, _, taken = sample(s, data)
        masked = jnp.where(taken.mask[:, None], taken.examples["x"], 0.0)
        return (apply(s, {"w": masked + rows}), masked), None

    return jax.lax.scan(body, (s, jnp.zeros((16, WIDTH))), None, length=3)[0][0]


@leaks
def counts_releases_in_eight_bits(s, data):
    def body(carry, _):
        s, count = carry
        private, *rest = s.opt_state
        private = private._replace(step=count.astype(jnp.int32), key=KEY)
        after = honest(s._replace(opt_state=(private, *rest)), data)
        return (after, count + jnp.int8(1)), None

    return jax.lax.scan(body, (s, jnp.int8(0)), None, length=300)[0]


@leaks
def uses_one_batch_in_all_iterations(s, data):
    s, _, taken = sample(s, data)
    return jax.lax.scan(
        lambda s, _: (apply(s, gradients(s.params, taken)), None), s, None, length=3
    )[0]


@leaks
def adds_the_order_of_the_sampler(s, data):
    sampler = dpoptax.samplers.BallsInBins(N, 10)
    state, batch = sampler.sample(sampler.init(s.sampler_state.key))
    grads = gradients(s.params, take(data, batch))
    after = apply(s, grads)
    first = state.order[0].astype(jnp.float32)
    return after._replace(params={"w": after.params["w"] + first})

"""Programs that leak by what a rule takes for granted: keys, slots, masks, states, and names."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from audit.leaking_programs import (
    DATA,
    LABELS,
    SAMPLER,
    TX,
    WIDTH,
    N,
    apply,
    gradients,
    honest,
    initial,
    loss,
    privatize,
    sample,
)
from audit.more_leaking_programs import masked, stacked, with_state

import dpoptax
from dpoptax.clipping import QuantileClip
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.samplers import Batch, take
from dpoptax.samplers._base import SamplerState
from dpoptax.training._noise_binding import bind_key
from dpoptax.transforms import _privatize

# Name: (program, its arguments before the data).
PROGRAMS: dict[str, Any] = {}
PARENT = jax.random.key(1)
OWN = jax.random.key(9)
QUANTILE = optax.chain(privatize(QuantileClip(1.0)), optax.sgd(0.1))


def leaks(*args):
    def add(program):
        PROGRAMS[program.__name__] = (program, args or (initial(),))
        return program

    return add


def zero(s):
    """A number that is zero, which only the values tell."""
    return (s.opt_state[0].step % 7) * 0


def shown(key):
    return jax.random.normal(key, (3,))


# Keys and seeds that are computed


@leaks()
def computes_the_seed_of_the_noise(s, data):
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(zero(s) + 1), 0))


@leaks()
def computes_the_seed_by_a_narrow_type(s, data):
    seed = jnp.int32(257).astype(jnp.int8).astype(jnp.int32)
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(seed), 0))


@leaks()
def computes_the_seed_by_a_fraction(s, data):
    seed = jnp.float32(1.5).astype(jnp.int32)
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(seed), 0))


@leaks()
def derives_the_noise_key_from_its_parent_by_an_unknown_number(s, data):
    return honest(s, data), shown(jax.random.fold_in(PARENT, zero(s)))


@leaks()
def derives_the_sampling_key_by_an_unknown_number(s, data):
    keys = jax.random.split(jax.random.key(5))
    return honest(s, data), shown(keys[zero(s)])


@leaks()
def wraps_written_words_of_the_parent(s, data):
    key = jax.random.wrap_key_data(jnp.array([0, 1], jnp.uint32))
    return honest(s, data), shown(jax.random.fold_in(key, 0))


@leaks()
def wraps_computed_words_of_the_parent(s, data):
    words = jnp.zeros(2, jnp.uint32).at[1].set(1)
    return honest(s, data), shown(jax.random.fold_in(jax.random.wrap_key_data(words), 0))


@leaks(initial(), jax.random.key_data(PARENT))
def wraps_words_of_an_argument(s, words, data):
    key = jax.random.wrap_key_data(words)
    return honest(s, data), shown(jax.random.fold_in(key, 0))


@leaks()
def selects_the_parent_among_keys(s, data):
    keys = jnp.stack([OWN, PARENT])
    return honest(s, data), shown(jax.random.fold_in(keys[1 + zero(s)], 0))


@leaks()
def seeds_by_a_loop(s, data):
    seed = jax.lax.fori_loop(0, 1, lambda i, x: x + 1, jnp.int32(0))
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(seed), 0))


@leaks()
def seeds_of_an_array(s, data):
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    return honest(s, data), shown(jax.random.fold_in(keys[1], 0))


@leaks()
def folds_an_array_of_numbers(s, data):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(PARENT, jnp.arange(3))
    return honest(s, data), jax.vmap(shown)(keys)


@leaks()
def splits_the_parent_over_a_scan(s, data):
    shown_keys = jax.lax.map(shown, jax.random.split(PARENT, 4))
    return honest(s, data), shown_keys


@leaks()
def seeds_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.fold_in(jax.random.key(jnp.sum(params["w"] * 0).astype(int) + 1), 0)
        return loss(params, row) + jnp.sum(params["w"] * shown(key))

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


# Keys that are bound to the data


@leaks()
def draws_of_a_key_bound_in_the_iteration_before(s, data):
    def body(key, _):
        return bind_key(key, data, "own"), shown(key)

    _, draws = jax.lax.scan(body, s.key, None, length=3)
    return honest(s, data), draws


@leaks()
def draws_of_a_key_bound_in_the_call_before(s, data):
    draws = shown(s.key)
    return honest(s, data)._replace(key=bind_key(s.key, data, "own")), draws


@leaks()
def samples_by_a_key_bound_in_the_call_before(s, data):
    s = honest(s, data)
    state = s.sampler_state
    return s._replace(sampler_state=state._replace(key=bind_key(state.key, data, "own")))


@leaks()
def compares_a_bound_key_with_itself(s, data):
    key = bind_key(s.key, data, "own")
    return honest(s, data), jax.random.key_data(key)[0] % 2


@leaks()
def folds_a_bound_key_into_its_own(s, data):
    words = jax.random.key_data(bind_key(s.key, data, "own"))
    return honest(s, data), shown(jax.random.fold_in(OWN, words[0]))


# Bare keys and counters at the places of arguments


@leaks(initial(), jax.random.key(3))
def returns_a_constant_key_at_the_place_of_the_noise_key(s, key, data):
    now, later = jax.random.split(key)
    after = honest(with_state(s, key=now, step=jnp.int32(0)), data)
    return with_state(after, key=s.opt_state[0].key), OWN, {"next": later}


@leaks(initial(), jax.random.key(3))
def returns_the_noise_key_at_the_place_of_its_own(s, old, data):
    return honest(s, data), s.opt_state[0].key, shown(old)


@leaks(initial(), jax.random.key(3), jax.random.key(4))
def swaps_two_bare_keys(s, mine, noise, data):
    draws = shown(mine)
    now, later = jax.random.split(noise)
    after = honest(with_state(s, key=now, step=jnp.int32(0)), data)
    return with_state(after, key=s.opt_state[0].key), later, mine, draws


@leaks(initial(), jnp.int32(0))
def returns_a_constant_at_the_place_of_the_counter(s, count, data):
    key = s.opt_state[0].key
    after = honest(with_state(s, step=count), data)
    return with_state(after, key=key, step=jnp.int32(0)), jnp.int32(0), {"next": count + 1}


@leaks(initial(), jnp.int32(0))
def keys_by_a_bare_counter_that_stays(s, count, data):
    key = jax.random.fold_in(OWN, count)
    after = honest(with_state(s, key=key, step=jnp.int32(0)), data)
    return with_state(after, key=s.opt_state[0].key), jnp.int32(0), {"later": count + 1}


@leaks({"a": initial(), "key": jax.random.key(3)})
def returns_a_constant_key_in_a_dictionary(d, data):
    now, later = jax.random.split(d["key"])
    s = honest(with_state(d["a"], key=now, step=jnp.int32(0)), data)
    s = with_state(s, key=d["a"].opt_state[0].key)
    return {"a": s, "key": OWN, "next": later}


@leaks(jax.random.key(3), initial())
def returns_a_constant_key_first(key, s, data):
    now, later = jax.random.split(key)
    after = honest(with_state(s, key=now, step=jnp.int32(0)), data)
    return OWN, with_state(after, key=s.opt_state[0].key), later


# States


class Counted(NamedTuple):
    step: Any
    key: Any
    calls: Any

    def keys(self, num):
        return SamplerState(self.step, self.key).keys(num)

    def advanced(self):
        return Counted(self.step + 1, self.key, self.calls)


@leaks()
def samples_twice_by_a_state_with_another_number(s, data):
    state = s.sampler_state
    for calls in range(2):
        own, batch = SAMPLER.sample(Counted(state.step, state.key, jnp.int32(calls)))
        s = apply(s, gradients(s.params, take(data, batch)))
    return s._replace(sampler_state=SamplerState(own.step, own.key))


class Twisted(NamedTuple):
    step: Any
    key: Any

    def keys(self, num):
        return jax.random.split(jax.random.fold_in(self.key, 0), num)

    def advanced(self):
        return Twisted(self.step + 1, self.key)


@leaks(initial()._replace(sampler_state=Twisted(jnp.int32(0), jax.random.key(6))))
def samples_by_a_state_that_ignores_its_number(s, data):
    return honest(s, data)


class Leaky(NamedTuple):
    step: Any
    key: Any

    def keys(self, num):
        return jax.random.split(OWN, num)

    def advanced(self):
        return Leaky(self.step + 1, self.key)


@leaks(initial()._replace(sampler_state=Leaky(jnp.int32(0), jax.random.key(6))))
def samples_by_a_state_with_a_constant_key(s, data):
    return honest(s, data)


# Masks and clips with votes


@leaks(initial(QUANTILE))
def counts_votes_of_padded_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, g), QUANTILE)


@leaks(initial(QUANTILE))
def counts_votes_with_a_mask_of_ones(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    ones = jnp.ones_like(taken.mask)
    return apply(s, StackedGrads(grads.stacked(), ones), QUANTILE)


@leaks(initial(QUANTILE))
def starts_its_clip_at_no_number(s, data):
    state = jax.tree.map(lambda x: x * jnp.nan, s.opt_state[0].clip_state)
    s, _, taken = sample(with_state(s, clip_state=state), data)
    grads = gradients(s.params, taken)
    return apply(s, StackedGrads(grads.gradients, jnp.ones_like(grads.mask)), QUANTILE)


# Code of the package with its own values


class Loose:
    """Says that it clips and adds noise, and does not."""

    settings = TX and (dpoptax.clipping.FlatClip(1.0), 1.0, 1.1, 6, dpoptax.mechanisms.Gaussian())
    identity = ""

    def __call__(self, keys, grads, states, step):
        return grads.weighted_sum(jnp.ones(len(grads.mask))), states


@leaks()
def gives_a_release_of_its_own_to_the_package(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    state = s.opt_state[0]
    keys = _privatize.NoiseKeys(state.key, jax.random.fold_in(state.key, state.step), "")
    states = _privatize.ReleaseState((), ())
    sums, _, step = _privatize._run_release(
        Loose(), keys, grads, states, state.step, params=s.params
    )
    return with_state(s, step=step)._replace(params=sums)


# Names


@leaks()
def has_a_name_that_holds_nonprivate(s, data):
    return honest(s, data), {"the public mean (not nonprivate_)": jnp.mean(data["x"])}


@leaks()
def has_a_name_that_ends_with_nonprivate(s, data):
    return honest(s, data), {"mean, nonprivate_": jnp.mean(data["x"])}


# Captured numbers


@leaks()
def captures_some_labels(s, data):
    return honest(s, data), jnp.asarray(np.array([3, 0, 1, 2, 3, 0, 1, 2, 3, 0], np.int32)[:9]) * 1


@leaks()
def captures_all_labels_but_one(s, data):
    return honest(s, data), jnp.asarray(LABELS[1:]) + 0


@leaks()
def captures_data_with_a_column_more(s, data):
    wide = jnp.asarray(np.concatenate([DATA.T, np.ones((1, N), np.float32)]))
    return honest(s, data), wide * 1


# Loops and conditions


@leaks()
def carries_the_mask_to_the_next_batch(s, data):
    def body(c, _):
        s, mask = c
        s, batch, taken = sample(s, data)
        g = gradients(s.params, taken.examples).stacked()["w"]
        s = apply(s, {"w": jnp.where(mask[:, None], g, 0.0)})
        return (s, batch.mask), None

    s, batch, _ = sample(s, data)
    return jax.lax.scan(body, (s, batch.mask), None, length=2)[0][0]


@leaks()
def selects_the_batch_in_a_branch(s, data):
    s, one, _ = sample(s, data)
    s, two, _ = sample(s, data)
    batch = jax.lax.cond(s.params["w"][0] > 0, lambda: one, lambda: two)
    s = apply(s, gradients(s.params, take(data, batch)))
    return apply(s, gradients(s.params, take(data, one)))


@leaks()
def reuses_a_batch_in_one_branch(s, data):
    s, _, taken = sample(s, data)
    s = jax.lax.cond(
        s.params["w"][0] > 0, lambda s: apply(s, gradients(s.params, taken)), lambda s: s, s
    )
    return apply(s, gradients(s.params, taken))


@leaks()
def releases_in_the_condition_of_a_loop(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)

    def cond(c):
        return jnp.sum(apply(s, grads).params["w"]) > c

    out = jax.lax.while_loop(cond, lambda c: c + 1.0, 0.0)
    return apply(s, grads), out


@leaks()
def skips_by_sampling_bits(s, data):
    before, batch, taken = sample(s, data)
    after = apply(before, gradients(s.params, taken))
    return jax.tree.map(lambda a, b: a, after, before), jnp.sum(batch.mask) * 0 + 1


@leaks()
def counts_by_a_private_while(s, data):
    n = jax.lax.while_loop(lambda i: data["x"][0, 0] > i, lambda i: i + 1, 0)
    return honest(s, data), n


@leaks()
def switches_by_labels(s, data):
    branch = lambda k: lambda: jnp.float32(k)  # noqa: E731
    out = jax.lax.switch(data["y"][0], [branch(k) for k in range(4)])
    return honest(s, data), out


@leaks()
def returns_one_row_of_a_scan(s, data):
    _, rows = jax.lax.scan(lambda c, row: (c, row), 0.0, data["x"])
    return honest(s, data), rows[0]


@leaks()
def scans_features_with_memory_of_rows(s, data):
    def body(c, column):
        return jnp.roll(column, 1), c

    s, taken, g = stacked(s, data)
    _, out = jax.lax.scan(body, jnp.zeros(len(g)), g.T)
    return apply(s, masked(taken, out.T))


@leaks()
def scans_backwards_over_rows(s, data):
    s, taken, g = stacked(s, data)
    _, flipped = jax.lax.scan(lambda c, row: (c, row), 0, g, reverse=True)
    _, out = jax.lax.scan(lambda c, row: (row, c), jnp.zeros(WIDTH), flipped)
    return apply(s, masked(taken, out))


@leaks()
def nests_scans_over_two_orders(s, data):
    s, taken, g = stacked(s, data)

    def outer(_, row):
        return 0, jax.lax.scan(lambda c, other: (c, jnp.vdot(row, other)), 0, g)[1]

    _, out = jax.lax.scan(outer, 0, g)
    return apply(s, masked(taken, out[:, :3]))


# Rows


@leaks()
def contracts_by_einsum_over_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.einsum("bi,ci->cb", g, g)[:, :3]))


@leaks()
def cumulates_after_a_reshape(s, data):
    s, taken, g = stacked(s, data)
    flat = jnp.cumsum(g.reshape(-1)).reshape(g.shape)
    return apply(s, masked(taken, flat))


@leaks()
def updates_a_slice_across_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.dynamic_update_slice(g, g[:1] * 5, (1, 0))))


@leaks()
def pads_and_cuts_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.pad(g, 0.0, ((1, -1, 0), (0, 0, 0)))))


@leaks()
def dilates_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.pad(g, 0.0, ((0, 0, 1), (0, 0, 0)))[: len(g)]))


@leaks()
def pads_by_a_private_value(s, data):
    s, taken, g = stacked(s, data)
    wide = jax.lax.pad(g[:, :2], g[0, 0], ((0, 0, 0), (0, 1, 0)))
    return apply(s, masked(taken, wide))


@leaks()
def clamps_by_another_row(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.clamp(g[0, 0], g, g[1, 1])))


@leaks()
def gathers_with_a_private_start(s, data):
    s, taken, g = stacked(s, data)
    start = jnp.argmax(g[:, 0])
    return apply(s, masked(taken, jnp.roll(g, start, axis=0)))


@leaks()
def fills_all_rows_with_the_largest(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jax.lax.cummax(g, axis=0, reverse=True)))


@leaks()
def solves_triangles_over_rows(s, data):
    s, taken, g = stacked(s, data)
    a = jnp.eye(len(g)) + jnp.tril(g @ g.T)
    return apply(s, masked(taken, jax.scipy.linalg.solve_triangular(a, g, lower=True)))


@leaks()
def changes_the_type_across_rows(s, data):
    s, taken, g = stacked(s, data)
    half = jax.lax.bitcast_convert_type(g, jnp.uint16)
    return apply(s, masked(taken, half.reshape(len(g), -1)[:, :3].astype(jnp.float32)[::-1]))


@leaks()
def weighs_by_the_number_of_real_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, g / jnp.sum(taken.mask).astype(jnp.float32)))


# Outside of the step


@leaks()
def takes_gradients_by_itself_of_the_batch(s, data):
    s, _, taken = sample(s, data)
    mean = lambda w: jnp.mean(jnp.sum((w - taken.examples["x"]) ** 2, -1))  # noqa: E731
    g = jax.grad(mean)(s.params["w"])
    return apply(s, {"w": jnp.where(taken.mask[:, None], g, 0.0)})


@leaks()
def differentiates_through_a_release(s, data):
    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken)), jax.grad(lambda w: jnp.sum(w * data["x"]))(1.0)


@leaks()
def returns_a_residual(s, data):
    _, vjp = jax.vjp(lambda w: w * jnp.sum(data["x"]), s.params["w"])
    return honest(s, data), vjp(jnp.ones(3))


@leaks()
def returns_shapes_of_private_values(s, data):
    nonzero = jnp.nonzero(data["y"], size=N, fill_value=-1)[0]
    return honest(s, data), nonzero


@leaks()
def trains_all_data_with_a_public_subset_twice(s, data):
    grads = gradients(s.params, data).stacked()["w"]
    return apply(s, {"w": jnp.repeat(grads, 2, axis=0)})


@leaks()
def doubles_the_data_before_the_gradient(s, data):
    both = jax.tree.map(lambda x: jnp.concatenate([x, x]), data)
    return apply(s, gradients(s.params, both))


@leaks()
def takes_two_columns_of_different_batches(s, data):
    s, one, _ = sample(s, data)
    s, two, _ = sample(s, data)
    a, b = take(data["x"], one), take(data["y"], two)
    grads = gradients(s.params, {"x": a, "y": b})
    return apply(s, grads)


@leaks()
def fills_padding_with_means(s, data):
    s, _, taken = sample(s, data)
    x = jnp.where(taken.mask[:, None], taken.examples["x"], jnp.mean(taken.examples["x"], 0))
    return apply(s, gradients(s.params, {"x": x}, mask=taken.mask))


@leaks()
def masks_by_labels_of_others(s, data):
    s, _, taken = sample(s, data)
    first = taken.examples["y"][0] > 1
    return apply(s, gradients(s.params, taken, mask=taken.mask & first))


@leaks()
def drops_the_first_half_of_rows(s, data):
    s, batch, _ = sample(s, data)
    half = Batch(batch.indices[:8], batch.mask[:8])
    return apply(s, gradients(s.params, take(data, half)))


@leaks()
def draws_of_a_key_bound_in_a_loop(s, data):
    key = jax.lax.fori_loop(0, 2, lambda i, key: bind_key(key, data, "own"), s.key)
    return honest(s, data), shown(key)


@leaks()
def draws_of_a_key_bound_in_a_loop_of_two_keys(s, data):
    def body(_, keys):
        one, two = keys
        return two, bind_key(one, data, "own")

    key, _ = jax.lax.fori_loop(0, 2, body, (s.key, OWN))
    return honest(s, data), shown(key)


@leaks()
def draws_of_a_key_bound_in_a_branch(s, data):
    key = jax.lax.cond(s.params["w"][0] > 0, lambda: bind_key(s.key, data, "own"), lambda: s.key)
    return honest(s, data), shown(key)


class Box(NamedTuple):
    w: Any
    key: Any


BOXES = Box(jnp.zeros(2), jax.random.key(3)), Box(jnp.zeros(2), jax.random.key(4))


@leaks(initial(), *BOXES)
def exchanges_keys_of_two_boxes(s, noise, mine, data):
    draws = shown(mine.key)
    now, later = jax.random.split(noise.key)
    after = with_state(honest(with_state(s, key=now, step=jnp.int32(0)), data), key=s.key)
    after = with_state(after, key=s.opt_state[0].key)
    return after, Box(noise.w, mine.key), Box(mine.w, later), draws


@leaks(*[initial()._replace(key=box.key) for box in BOXES])
def exchanges_keys_of_two_states(one, two, data):
    draws = shown(two.key)
    now, later = jax.random.split(one.key)
    after = with_state(honest(with_state(one, key=now, step=jnp.int32(0)), data), key=OWN)
    after = with_state(after, key=one.opt_state[0].key)
    return after._replace(key=two.key), two._replace(key=later), draws


@leaks(initial(QUANTILE))
def sets_its_clip_to_zero(s, data):
    zero = jax.tree.map(jnp.zeros_like, s.opt_state[0].clip_state)
    s, _, taken = sample(with_state(s, clip_state=zero), data)
    return apply(s, gradients(s.params, taken), QUANTILE)


@leaks(initial(QUANTILE))
def sets_its_clip_below_all_numbers(s, data):
    small = jax.tree.map(lambda x: x * 1e-44, s.opt_state[0].clip_state)
    s, _, taken = sample(with_state(s, clip_state=small), data)
    return apply(s, gradients(s.params, taken), QUANTILE)


@leaks()
def takes_the_noise_from_a_captured_key_and_counts(s, data):
    key = jax.random.fold_in(OWN, s.opt_state[0].step)
    after = honest(with_state(s, key=key), data)
    return with_state(after, key=s.opt_state[0].key), shown(jax.random.fold_in(OWN, zero(s)))


@leaks()
def uses_one_batch_under_two_names(s, data):
    s, batch, _ = sample(s, data)
    for _ in range(2):
        copy = Batch(*jax.lax.optimization_barrier(tuple(batch)))
        s = apply(s, gradients(s.params, take(data, copy)))
    return s


@leaks()
def draws_the_batch_from_its_copied_key(s, data):
    s = honest(s, data)
    words = jax.random.key_data(s.sampler_state.key)
    again = jax.random.wrap_key_data(words)
    return s, shown(jax.random.fold_in(again, s.sampler_state.step))


@leaks(initial(), jax.random.split(jax.random.key(5), 3))
def draws_from_an_array_with_the_sampling_key(s, keys, data):
    return honest(s, data), shown(keys[0])


@leaks(initial(), jax.random.split(jax.random.key(5), 3))
def draws_from_all_of_an_array_with_the_sampling_key(s, keys, data):
    return honest(s, data), jax.lax.map(shown, keys)


@leaks(initial(), jax.random.split(jax.random.key(5), 3))
def draws_from_one_of_an_array_with_the_sampling_key(s, keys, data):
    return honest(s, data), shown(keys[zero(s)])


@leaks(initial(), jnp.stack([jax.random.key(3), jax.random.fold_in(PARENT, 0)]))
def passes_the_noise_key_in_an_array(s, keys, data):
    return honest(s, data), jax.vmap(shown)(keys)


@leaks(initial(), PARENT)
def draws_next_to_the_noise_of_an_argument(s, parent, data):
    return honest(s, data), shown(jax.random.fold_in(parent, s.opt_state[0].step)), parent


@leaks(initial(), jax.random.key(5))
def draws_next_to_the_sampling_of_an_argument(s, parent, data):
    return honest(s, data), jax.vmap(shown)(jax.random.split(parent, 2)), parent


@leaks(initial(), jnp.uint32(1))
def seeds_by_an_argument(s, seed, data):
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(seed), 0))


@leaks(initial(), jnp.array([0, 0, 1], jnp.uint32))
def wraps_a_part_of_an_argument(s, words, data):
    key = jax.random.wrap_key_data(words[1:])
    return honest(s, data), shown(jax.random.fold_in(key, 0))


@leaks()
def splits_by_a_loop_from_the_parent(s, data):
    key = jax.lax.fori_loop(0, 1, lambda i, key: jax.random.fold_in(key, i), PARENT)
    return honest(s, data), shown(key)


@leaks()
def chooses_between_the_parent_and_its_own(s, data):
    key = jax.lax.cond(s.params["w"][0] > 0, lambda: OWN, lambda: PARENT)
    return honest(s, data), shown(jax.random.fold_in(key, 0))


@leaks()
def folds_zero_into_the_parent_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.fold_in(PARENT, row["y"] * 0)
        return loss(params, row) + jnp.sum(params["w"] * shown(key))

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


@leaks()
def draws_for_each_label_of_the_parent(s, data):
    draws = jax.vmap(lambda y: shown(jax.random.fold_in(PARENT, y)))(jnp.arange(2))
    return honest(s, data), draws


@leaks()
def hides_a_release_in_a_key(s, data):
    s, _, taken = sample(s, data)
    g = gradients(s.params, taken).stacked()["w"]
    words = jax.lax.bitcast_convert_type(g[0, :2], jnp.uint32)
    return apply(s, masked(taken, g)), jax.random.wrap_key_data(words)


@leaks()
def weighs_a_mask_of_numbers(s, data):
    s, batch, _ = sample(s, data)
    ones = Batch(batch.indices, batch.mask | True)
    both = take(data, ones)
    g = gradients(s.params, both.examples).stacked()["w"]
    return apply(s, {"w": g + 0.0})


class Place(NamedTuple):
    w: Any
    count: Any


@leaks(initial(), Place(jnp.zeros(2), jnp.int32(0)))
def counts_in_a_circle(s, place, data):
    after = honest(with_state(s, step=place.count), data)
    after = with_state(after, key=jax.random.split(s.opt_state[0].key)[0], step=jnp.int32(0))
    after = with_state(after, key=s.opt_state[0].key)
    key = jax.random.fold_in(s.key, place.count)
    again = honest(with_state(after, key=key, step=jnp.int32(0)), data)
    again = with_state(again, key=s.opt_state[0].key, step=after.opt_state[0].step)
    return again, Place(place.w, (place.count + 1) % 3)


@leaks(initial(), jnp.int32(0))
def counts_in_a_circle_alone(s, count, data):
    key = jax.random.fold_in(s.key, count)
    after = honest(with_state(s, key=key, step=jnp.int32(0)), data)
    return with_state(after, key=s.opt_state[0].key), (count + 1) % 3


@leaks(initial(), Place(jnp.zeros(2), jnp.int32(0)))
def folds_a_circle(s, place, data):
    key = jax.random.fold_in(s.key, place.count)
    after = honest(with_state(s, key=key, step=jnp.int32(0)), data)
    return with_state(after, key=s.opt_state[0].key), Place(place.w, (place.count + 1) % 3)


SHAPES = jax.eval_shape(initial)


@leaks(SHAPES)
def derives_the_noise_of_an_unknown_key_from_its_parent(s, data):
    return honest(s, data), shown(jax.random.fold_in(PARENT, 0))


@leaks(SHAPES)
def computes_the_noise_of_an_unknown_key_from_its_seed(s, data):
    return honest(s, data), shown(jax.random.fold_in(jax.random.key(1), 0))

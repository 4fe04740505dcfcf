"""Programs that leak through the slots of a state, the order of releases, and discarded batches."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from audit.leaking_programs import N, apply, gradients, loss, sample
from audit.more_leaking_programs import BANDS, TAPS, step_of, with_state

import dpoptax
from dpoptax.samplers import BallsInBins, CyclicPoisson, Poisson, Shuffled, take
from dpoptax.schedules import Schedule

# Name: (program, transformation, sampler).
PROGRAMS: dict[str, tuple[Any, Any, Any]] = {}
PLAIN = Poisson(N, 6, 16)
FADING = Schedule((9.0, 1.0), (10, 10))
CONSTANT = jax.random.key(77)


def leaks(program=None, *, noise=1.1, sampler=PLAIN, **options):
    if program is None:
        return lambda program: leaks(program, noise=noise, sampler=sampler, **options)
    key = jax.random.key(1)
    private = dpoptax.privatize(1.0, noise, expected_batch_size=6, key=key, **options)
    PROGRAMS[program.__name__] = (program, optax.chain(private, optax.sgd(0.1)), sampler)
    return program


def with_kept(s, change):
    """A state whose mechanism kept something else."""
    kept = s.opt_state[0].mechanism_state
    return with_state(s, mechanism_state=jax.tree.map(change, kept))


# Each value in the slot of another one


@leaks
def returns_a_constant_noise_state_beside_the_next_one(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, key=CONSTANT, step=jnp.int32(0)), {"next": after.opt_state}


@leaks
def returns_a_constant_sampler_state_beside_the_next_one(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    constant = sampler.init(CONSTANT)
    return after._replace(sampler_state=constant), {"next": after.sampler_state}


@leaks
def swaps_the_noise_key_with_its_own(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    swapped = with_state(after, key=s.key, step=jnp.int32(0))
    return swapped._replace(key=s.opt_state[0].key), {"next": after.opt_state}


@leaks
def draws_from_the_noise_key_of_the_call_before(s, data, tx, sampler):
    shown = jax.random.normal(s.key, (3,))
    used = s.opt_state[0].key
    after = step_of(s, data, tx, sampler)
    after = with_state(after, key=jax.random.fold_in(used, 1))
    return after._replace(key=used), shown


@leaks
def draws_from_the_sampling_key_of_the_call_before(s, data, tx, sampler):
    shown = jax.random.uniform(s.key, (N,))
    used = s.sampler_state.keys(1)[0]
    return step_of(s, data, tx, sampler)._replace(key=used), shown


@leaks
def samples_by_the_noise_key_of_the_call_before(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    state = after.sampler_state
    return after._replace(sampler_state=state._replace(key=s.opt_state[0].key)), state


@leaks
def forgets_its_own_key_for_a_constant(s, data, tx, sampler):
    private, *rest = s.opt_state
    used = private._replace(key=s.key)
    after = step_of(s._replace(opt_state=(used, *rest)), data, tx, sampler)
    return after._replace(key=CONSTANT, opt_state=s.opt_state)


@leaks(mechanism=BANDS)
def returns_kept_noise_as_parameters(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    kept = jax.tree.leaves(after.opt_state[0].mechanism_state)
    return after._replace(params={"w": next(leaf for leaf in kept if leaf.ndim)})


@leaks(sampler=BallsInBins(N, 10))
def returns_the_order_of_the_sampler_as_parameters(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    order = next(leaf for leaf in jax.tree.leaves(after.sampler_state) if leaf.ndim)
    return after._replace(params={"w": order})


@leaks
def returns_the_state_of_one_of_two_transformations_twice(s, data, tx, sampler):
    # The key of the caller is the second state here.
    private, *rest = s.opt_state
    other = private._replace(key=s.key, step=private.step)
    after = step_of(s, data, tx, sampler)
    two = step_of(after._replace(opt_state=(other, *rest)), data, tx, sampler)
    return two._replace(opt_state=after.opt_state, key=after.opt_state[0].key), two.opt_state


@leaks
def returns_the_mean_of_two_counters(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, step=(after.opt_state[0].step + s.opt_state[0].step) // 2)


@leaks
def returns_a_counter_of_the_sampler_as_that_of_the_noise(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    shown = {"next": after.opt_state}
    return with_state(after, step=after.sampler_state.step * 0 + 1), shown


@leaks
def restores_the_state_if_the_parameters_are_small(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    small = jnp.sum(after.params["w"] ** 2) < 1.0
    state = jax.tree.map(lambda a, b: jnp.where(small, a, b), s.opt_state, after.opt_state)
    return after._replace(opt_state=state), {"next": after.opt_state}


# A loop that may make no iteration


@leaks
def moves_its_key_in_a_loop_of_length_zero(s, data, tx, sampler):
    key, next_key = jax.random.split(s.key)
    s = step_of(with_state(s, key=key, step=jnp.int32(0)), data, tx, sampler)
    moved, _ = jax.lax.scan(lambda k, _: (jax.random.split(k)[0], None), key, None, length=0)
    s = step_of(with_state(s, key=moved, step=jnp.int32(0)), data, tx, sampler)
    return s._replace(key=next_key)


@leaks
def moves_its_key_while_the_parameters_are_large(s, data, tx, sampler):
    key, next_key = jax.random.split(s.key)
    s = step_of(with_state(s, key=key, step=jnp.int32(0)), data, tx, sampler)
    large = jnp.sum(s.params["w"]) > 9.0
    moved = jax.lax.while_loop(
        lambda c: c[1], lambda c: (jax.random.split(c[0])[0], c[0] is None), (key, large)
    )[0]
    s = step_of(with_state(s, key=moved, step=jnp.int32(0)), data, tx, sampler)
    return s._replace(key=next_key)


@leaks
def samples_by_a_key_moved_in_a_loop_of_length_zero(s, data, tx, sampler):
    state = s.sampler_state
    s = step_of(s, data, tx, sampler)
    moved = jax.lax.fori_loop(0, 0, lambda _, k: jax.random.split(k)[0], state.key)
    again = step_of(s._replace(sampler_state=state._replace(key=moved)), data, tx, sampler)
    return again._replace(sampler_state=s.sampler_state)


@leaks
def moves_its_state_in_a_loop_of_length_zero(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    moved = jax.lax.fori_loop(0, 0, lambda _, k: jax.random.split(k)[0], s.opt_state[0].key)
    return with_state(after, key=moved, step=s.opt_state[0].step)


# Noise that changes from step to step, by numbers out of order


@leaks(noise=FADING)
def pins_the_number_of_the_release(s, data, tx, sampler):
    key, use = jax.random.split(s.key)
    after = step_of(with_state(s, key=use, step=jnp.int32(15)), data, tx, sampler)
    return after._replace(key=key)


@leaks(noise=FADING)
def counts_releases_five_by_five(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, step=after.opt_state[0].step + 4)


@leaks(noise=FADING)
def begins_with_a_late_number(s, data, tx, sampler):
    step = s.opt_state[0].step
    after = step_of(with_state(s, step=step + 10), data, tx, sampler)
    return with_state(after, step=step + 1)


@leaks(noise=FADING)
def makes_two_releases_of_one_number(s, data, tx, sampler):
    step, keys = s.opt_state[0].step, jax.random.split(s.opt_state[0].key, 3)
    s = step_of(with_state(s, key=keys[0]), data, tx, sampler)
    s = step_of(with_state(s, key=keys[1], step=step), data, tx, sampler)
    return with_state(s, key=keys[2])


@leaks(noise=FADING)
def moves_the_key_and_not_the_number(s, data, tx, sampler):
    private = s.opt_state[0]
    after = step_of(s, data, tx, sampler)
    return with_state(after, key=jax.random.fold_in(private.key, 3), step=private.step)


@leaks(noise=FADING)
def uses_one_number_in_all_iterations(s, data, tx, sampler):
    step = s.opt_state[0].step

    def body(s, _):
        s = step_of(with_state(s, step=step), data, tx, sampler)
        return with_state(s, key=jax.random.fold_in(s.opt_state[0].key, 3)), None

    return jax.lax.scan(body, s, None, length=3)[0]


@leaks(noise=FADING)
def starts_the_transformation_anew_in_each_call(s, data, tx, sampler):
    key, use = jax.random.split(s.key)
    private, *rest = tx.init(s.params)
    fresh = (private._replace(key=use, step=jnp.int32(12)), *rest)
    after = step_of(s._replace(opt_state=fresh), data, tx, sampler)
    return after._replace(key=key)


# Noise that is correlated, by a state that is not that after the release before


@leaks(mechanism=BANDS)
def scales_kept_noise(s, data, tx, sampler):
    return step_of(with_kept(s, lambda leaf: leaf * 1000), data, tx, sampler)


@leaks(mechanism=BANDS)
def forgets_kept_noise(s, data, tx, sampler):
    return step_of(with_kept(s, jnp.zeros_like), data, tx, sampler)


@leaks(mechanism=BANDS)
def negates_kept_noise(s, data, tx, sampler):
    return step_of(with_kept(s, jnp.negative), data, tx, sampler)


@leaks(mechanism=BANDS)
def rolls_kept_noise(s, data, tx, sampler):
    return step_of(with_kept(s, lambda leaf: jnp.roll(leaf, 1, axis=0)), data, tx, sampler)


@leaks(mechanism=BANDS)
def keeps_scaled_noise(s, data, tx, sampler):
    return with_kept(step_of(s, data, tx, sampler), lambda leaf: leaf * 2)


@leaks(mechanism=BANDS)
def uses_kept_noise_of_the_release_before_the_last(s, data, tx, sampler):
    one = step_of(s, data, tx, sampler)
    return step_of(
        with_state(one, mechanism_state=s.opt_state[0].mechanism_state), data, tx, sampler
    )


@leaks(mechanism=BANDS)
def uses_the_first_kept_noise_in_all_iterations(s, data, tx, sampler):
    first = s.opt_state[0].mechanism_state

    def body(s, _):
        return step_of(with_state(s, mechanism_state=first), data, tx, sampler), None

    return jax.lax.scan(body, s, None, length=3)[0]


@leaks(mechanism=BANDS)
def returns_kept_noise_of_the_release_before_the_last(s, data, tx, sampler):
    one = step_of(s, data, tx, sampler)
    two = step_of(one, data, tx, sampler)
    return with_state(two, mechanism_state=one.opt_state[0].mechanism_state)


@leaks(mechanism=BANDS)
def keeps_noise_in_one_branch(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    kept = jax.lax.cond(
        after.params["w"][0] > 0,
        lambda: after.opt_state[0].mechanism_state,
        lambda: s.opt_state[0].mechanism_state,
    )
    return with_state(after, mechanism_state=kept)


@leaks(mechanism=TAPS)
def reverses_past_keys(s, data, tx, sampler):
    return step_of(with_kept(s, lambda leaf: leaf[::-1]), data, tx, sampler)


@leaks(mechanism=TAPS)
def replaces_past_keys(s, data, tx, sampler):
    key, use = jax.random.split(s.key)
    new = with_kept(s, lambda leaf: jax.random.split(use, leaf.shape))
    return step_of(new, data, tx, sampler)._replace(key=key)


@leaks(mechanism=BANDS)
def skips_numbers_of_correlated_noise(s, data, tx, sampler):
    after = step_of(s, data, tx, sampler)
    return with_state(after, step=after.opt_state[0].step + 2)


@leaks(mechanism=TAPS)
def starts_correlated_noise_anew(s, data, tx, sampler):
    key, use = jax.random.split(s.key)
    private, *rest = tx.init(s.params)
    fresh = (private._replace(key=use), *rest)
    return step_of(s._replace(opt_state=fresh), data, tx, sampler)._replace(key=key)


# Batches that are drawn and not released, by a sampler that counts on them


def skip(s, sampler, count=1):
    for _ in range(count):
        s = s._replace(sampler_state=sampler.sample(s.sampler_state)[0])
    return s


@leaks(sampler=CyclicPoisson(N, 6, 4))
def trains_on_one_group_of_four(s, data, tx, sampler):
    return step_of(skip(s, sampler, 3), data, tx, sampler)


@leaks(sampler=Shuffled(N, 6))
def shuffles_after_each_batch(s, data, tx, sampler):
    return skip(step_of(s, data, tx, sampler), sampler, 9)


@leaks(sampler=BallsInBins(N, 10))
def discards_all_bins_but_one(s, data, tx, sampler):
    return skip(step_of(s, data, tx, sampler), sampler, 9)


@leaks(sampler=CyclicPoisson(N, 6, 4))
def discards_batches_in_a_loop(s, data, tx, sampler):
    s = jax.lax.fori_loop(0, 3, lambda _, s: skip(s, sampler), s)
    return step_of(s, data, tx, sampler)


@leaks(sampler=CyclicPoisson(N, 6, 4))
def releases_one_call_in_four(s, data, tx, sampler):
    state, batch = sampler.sample(s.sampler_state)
    grads = gradients(s.params, take(data, batch))
    turn = s.sampler_state.step % 4 == 0
    s = s._replace(sampler_state=state)
    return jax.lax.cond(turn, lambda: apply(s, grads, tx), lambda: s)


@leaks(sampler=CyclicPoisson(N, 6, 4))
def discards_a_batch_in_one_branch(s, data, tx, sampler):
    turn = s.sampler_state.step % 4 == 0
    return jax.lax.cond(turn, lambda: step_of(s, data, tx, sampler), lambda: skip(s, sampler))


# Draws that reach gradients on other ways


@leaks
def adds_sampling_draws_to_a_column(s, data, tx, sampler):
    u = jax.random.uniform(s.sampler_state.keys(2)[0], (N, 1))
    return step_of(s, {"x": data["x"] + u, "y": data["y"]}, tx, sampler)


@leaks
def gathers_sampling_draws(s, data, tx, sampler):
    u = jax.random.uniform(s.sampler_state.keys(2)[0], (N,))
    s, _, taken = sample(s, {**data, "u": u})
    return apply(s, gradients(s.params, taken, lambda p, r: loss(p, r) * r["u"]), tx)


@leaks(mechanism=BANDS)
def adds_kept_noise_to_a_column(s, data, tx, sampler):
    kept = [leaf for leaf in jax.tree.leaves(s.opt_state[0].mechanism_state) if leaf.ndim]
    column = data["x"] - kept[0].sum().astype(jnp.float32)
    return step_of(s, {**data, "x": column}, tx, sampler)


@leaks
def gathers_keys_of_the_noise(s, data, tx, sampler):
    keys = jnp.broadcast_to(s.opt_state[0].key, (N,))
    s, _, taken = sample(s, {**data, "key": keys})

    def noisy(params, row):
        return jnp.sum(params["w"] * jax.random.normal(row["key"], (3,))) + loss(params, row)

    return apply(s, gradients(s.params, taken, noisy), tx)


@leaks(noise=FADING)
def numbers_a_release_by_sampling_draws(s, data, tx, sampler):
    u = jax.random.uniform(s.sampler_state.keys(2)[0], (N,))
    key, use = jax.random.split(s.key)
    step = (u[0] < 0.1).astype(jnp.int32) * 15
    after = step_of(with_state(s, key=use, step=step), data, tx, sampler)
    return after._replace(key=key)


@leaks
def numbers_a_clip_by_sampling_draws(s, data, tx, sampler):
    u = jax.random.uniform(s.sampler_state.keys(2)[0], (N,))
    key, use = jax.random.split(s.key)
    own = dpoptax.privatize(
        Schedule((1.0, 1e-3), (10, 10)), 1.0, expected_batch_size=6, key=jax.random.key(3)
    )
    s, _, taken = sample(s._replace(key=key), data)
    step = (u[0] < 0.1).astype(jnp.int32) * 15
    state = s.opt_state[0]._replace(key=use, step=step)
    updates, _ = own.update(gradients(s.params, taken), state, s.params)
    return s._replace(params=optax.apply_updates(s.params, updates))


@leaks
def draws_of_a_key_bound_to_the_data(s, data, tx, sampler):
    from dpoptax.training._noise_binding import bind_key

    return step_of(s, data, tx, sampler), jax.random.normal(
        bind_key(jax.random.key(0), data["x"], "known"), (3,)
    )


@leaks
def evaluates_a_release_in_a_condition(s, data, tx, sampler):
    def small(s):
        return jnp.sum(step_of(s, data, tx, sampler).params["w"]) < 1

    def body(s):
        key, use = jax.random.split(s.key)
        return with_state(s, key=use, step=jnp.int32(0))._replace(key=key)

    return step_of(jax.lax.while_loop(small, body, s), data, tx, sampler)

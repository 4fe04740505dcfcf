"""Programs that leak through their own code, unusual primitives and types, and known keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from audit.leaking_programs import (
    DATA,
    TX,
    WIDTH,
    N,
    apply,
    gradients,
    honest,
    loss,
    privatize,
    sample,
)
from audit.more_leaking_programs import masked, stacked, with_state
from jax.extend.core import Primitive

import dpoptax
from dpoptax import _markers
from dpoptax.per_example import PerExampleGrads
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.samplers import Batch, take
from dpoptax.transforms._release import ReleaseState, SumRelease
from dpoptax.transforms._scaled_grads import ScaledGrads

PROGRAMS: dict[str, Any] = {}


def leaks(program):
    PROGRAMS[program.__name__] = program
    return program


def changed(s, shift):
    return s._replace(params={"w": s.params["w"] + shift})


# Keys that are derived from a key outside of the step, or made from a seed there

PARENT = jax.random.key(1)


@leaks
def derives_the_noise_key_from_its_captured_parent(s, data):
    return honest(s, data), jax.random.normal(jax.random.fold_in(PARENT, 0), (3,))


@leaks
def derives_the_noise_key_from_its_seed(s, data):
    key = jax.random.fold_in(jax.random.key(1), 0)
    return honest(s, data), jax.random.normal(key, (3,))


@leaks
def derives_the_sampling_key_from_its_seed(s, data):
    key = jax.random.split(jax.random.key(5))[0]
    return honest(s, data), jax.random.uniform(key, (N,))


@leaks
def derives_the_noise_key_from_its_seed_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.fold_in(jax.random.key(1), 0)
        return loss(params, row) + jnp.sum(params["w"] * jax.random.normal(key, (3,)))

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


@leaks
def derives_the_noise_key_from_its_captured_parent_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.fold_in(PARENT, 0)
        return loss(params, row) + jnp.sum(params["w"] * jax.random.normal(key, (3,)))

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


@leaks
def derives_the_sampling_key_from_its_seed_in_the_loss(s, data):
    def noisy(params, row):
        key = jax.random.split(jax.random.key(5))[0]
        key = jax.random.split(jax.random.fold_in(key, 0))[0]
        return loss(params, row) * jax.random.uniform(key, (N,))[3]

    s, _, taken = sample(s, data)
    return apply(s, gradients(s.params, taken, noisy))


@leaks
def uses_the_noise_key_and_its_captured_parent(s, data):
    s = honest(s, data)
    own = privatize(key=3)
    key = jax.random.fold_in(PARENT, 0)
    state = own.init(s.params)._replace(key=key, step=jnp.int32(0))
    s, _, taken = sample(s, data)
    updates, _ = own.update(gradients(s.params, taken), state, s.params)
    return changed(s, updates["w"])


@leaks
def samples_by_the_noise_key_of_its_captured_parent(s, data):
    key = jax.random.fold_in(PARENT, 0)
    z = jax.random.normal(jax.random.fold_in(key, s.opt_state[0].step), (3,))
    return changed(honest(s, data), -z)


# Gradients, markers and primitives of one's own


@dataclasses.dataclass(frozen=True)
class Unclipped(PerExampleGrads):
    rows: Any
    mask: Any

    def squared_norms(self):
        return jax.tree.map(lambda leaf: jnp.zeros(len(leaf)), self.rows)

    def weighted_sum(self, weights):
        return jax.tree.map(lambda leaf: leaf.sum(0), self.rows)

    def clip_and_sum(self, weights_of):
        return self.weighted_sum(None)

    def stacked(self):
        return jax.tree.map(lambda g: jnp.where(self.mask[:, None], g, 0.0), self.rows)

    def parameter_specs(self):
        return jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), self.rows)


class UnclippedStack(StackedGrads):
    def clip_and_sum(self, weights_of):
        return jax.tree.map(lambda leaf: leaf.sum(0), self.stacked())


@leaks
def has_gradients_of_its_own(s, data):
    s, _, taken = sample(s, data)
    rows = gradients(s.params, taken).stacked()
    return apply(s, Unclipped(rows, taken.mask))


@leaks
def has_a_subclass_of_gradients(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    return apply(s, UnclippedStack(grads.stacked(), grads.mask))


@leaks
def hides_gradients_of_its_own_in_others(s, data):
    s, _, taken = sample(s, data)
    own = Unclipped(gradients(s.params, taken).stacked(), taken.mask)
    return apply(s, ScaledGrads(taken.mask, own, {"w": jnp.float32(1.0)}))


@leaks
def marks_a_release_itself(s, data):
    s, _, taken = sample(s, data)
    rows = gradients(s.params, taken).stacked()
    release = SumRelease(dpoptax.clipping.FlatClip(1.0), 1.1, 6.0, dpoptax.mechanisms.Gaussian())
    key, use = jax.random.split(s.key)
    grads = StackedGrads(rows, taken.mask)
    total, *_ = _markers.released(release, use, grads, ReleaseState((), ()), s.opt_state[0].step)
    return changed(s, total["w"])._replace(key=key)


@leaks
def binds_the_marker_of_a_release(s, data):
    s, _, taken = sample(s, data)
    rows = gradients(s.params, taken).stacked()["w"]
    settings = (dpoptax.clipping.FlatClip(1.0), 1.0, 1.1, 6.0, dpoptax.mechanisms.Gaussian())
    note = _markers.Note(settings=settings, leaves=1, public=0, forms=[])
    key, use = jax.random.split(s.key)
    spec = [jax.ShapeDtypeStruct(x, y) for x, y in (((WIDTH,), np.float32), ((), np.int32))]
    total, _ = _markers.RELEASE.bind(use, s.opt_state[0].step, rows, outputs=tuple(spec), note=note)
    return changed(s, total)._replace(key=key)


@leaks
def marks_gradients_itself(s, data):
    s, _, taken = sample(s, data)
    marked = _markers.per_example(
        lambda p, r: (loss(p, r), []), s.params, (taken.examples,), taken.mask
    )
    return apply(s, StackedGrads(marked.gradients, taken.mask))


@leaks
def marks_a_key_itself(s, data):
    key = _markers.bound_key(s.opt_state[0].key, data)
    return honest(with_state(s, key=key), data)


def primitive(name, outputs):
    own = Primitive(name)
    own.multiple_results = outputs != 1
    own.def_abstract_eval(lambda *avals, **_: avals[0] if outputs == 1 else [])
    return own


SINE, PRINT, OPERATION, JIT = (
    primitive("sin", 1),
    primitive("debug_print", 0),
    primitive("call_hi_primitive", 2),
    primitive("jit", 1),
)


@leaks
def names_its_primitive_like_a_sine(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, SINE.bind(g)))


@leaks
def names_its_primitive_like_a_print(s, data):
    s = honest(s, data)
    PRINT.bind(s.params["w"], fmt="")
    return s


@leaks
def names_its_primitive_like_a_checkpoint(s, data):
    jaxpr = jax.make_jaxpr(lambda x: [x * 1.0])(s.params["w"])
    kind = type("RematTraced", (), {})
    operation = kind()
    operation.params = {"jaxpr": jaxpr, "policy": None}
    own = Primitive("call_hi_primitive")
    own.multiple_results = True
    own.def_abstract_eval(lambda *avals, **_: [avals[0]])
    (w,) = own.bind(s.params["w"], _prim=operation)
    return honest(s, data), w


@leaks
def names_its_primitive_like_a_call(s, data):
    s = honest(s, data)
    return s, JIT.bind(s.params["w"], jaxpr=jax.make_jaxpr(lambda x: x)(s.params["w"]))


@leaks
def composes_captured_data(s, data):
    own = jax.lax.composite(lambda w: w + DATA[:20].sum(0), name="own.add")
    return honest(s, data), own(s.params["w"])


@leaks
def composes_a_draw_of_the_noise_key(s, data):
    own = jax.lax.composite(
        lambda w: w + jax.random.normal(jax.random.fold_in(jax.random.key(1), 0), (3,)),
        name="own.draw",
    )
    return honest(s, data), own(s.params["w"])


@leaks
def composes_a_mean(s, data):
    return honest(s, data), jax.lax.composite(lambda x: x.mean(0), name="own.mean")(data["x"])


@leaks
def changes_the_sampler_by_a_subclass(s, data):
    class Own(dpoptax.samplers.Poisson):
        def sample(self, state):
            state, batch = super().sample(state)
            return state, Batch(jnp.sort(batch.indices), batch.mask)

    own = Own(N, 6, 16)
    sampler_state, batch = own.sample(s.sampler_state)
    taken = take({"x": data["x"][::-1], "y": data["y"]}, batch)
    return apply(s._replace(sampler_state=sampler_state), gradients(s.params, taken))


# Data that come in on other ways


@leaks
def captures_data_in_sixteen_bits(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(DATA[:40].astype(jnp.bfloat16)))


@leaks
def captures_bits_of_the_data(s, data):
    return honest(s, data), jnp.sum(jnp.asarray(DATA[:40].view(np.int32)))


@leaks
def captures_data_as_complex_numbers(s, data):
    return honest(s, data), jnp.sum(jnp.asarray((DATA[:40] + 0j).astype(np.complex64)))


# Types and primitives that look harmless


@leaks
def packs_bits(s, data):
    return honest(s, data), jnp.packbits(data["y"] > 1)


@leaks
def casts_to_small_floats(s, data):
    return honest(s, data), data["x"].astype(jnp.float8_e4m3fn)


@leaks
def casts_to_small_integers(s, data):
    return honest(s, data), data["y"].astype(jnp.int4)


@leaks
def hides_rows_in_imaginary_parts(s, data):
    s = honest(s, data)
    return s, jax.lax.complex(s.params["w"], data["x"].sum(0)).imag


@leaks
def adds_rows_by_labels(s, data):
    sums = jax.ops.segment_sum(data["x"], data["y"], num_segments=4)
    return changed(honest(s, data), sums[0])


@leaks
def counts_rows_of_each_label(s, data):
    return honest(s, data), jnp.bincount(data["y"], length=4)


@leaks
def looks_up_by_a_private_index(s, data):
    table = jnp.arange(4.0)
    return honest(s, data), jax.lax.dynamic_slice(table, (data["y"][0],), (1,))


@leaks
def looks_up_the_largest(s, data):
    return honest(s, data), jax.lax.approx_max_k(data["x"][:, 0], 2)[1]


@leaks
def multiplies_ragged_groups(s, data):
    sizes = jnp.bincount(data["y"], length=4).astype(jnp.int32)
    weights = jnp.ones((4, WIDTH, WIDTH))
    return honest(s, data), jax.lax.ragged_dot(jnp.ones((N, WIDTH)), weights, sizes)


@leaks
def transforms_rows_by_fourier(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.fft.fft(g, axis=0).real))


@leaks
def reduces_windows_of_rows(s, data):
    s, taken, g = stacked(s, data)
    means = jax.lax.reduce_window(g, 0.0, jax.lax.add, (3, 1), (1, 1), "SAME")
    return apply(s, masked(taken, means))


@leaks
def orthogonalises_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.linalg.qr(g)[0]))


@leaks
def averages_rows_by_a_named_axis(s, data):
    s, taken, g = stacked(s, data)
    mean = jax.vmap(lambda row: row + jax.lax.pmean(row, "rows"), axis_name="rows")(g)
    return apply(s, masked(taken, mean))


@leaks
def gathers_rows_by_a_named_axis(s, data):
    s, taken, g = stacked(s, data)
    other = jax.vmap(lambda row: jax.lax.all_gather(row, "rows")[3] + row, axis_name="rows")(g)
    return apply(s, masked(taken, other))


@leaks
def permutes_rows_by_a_named_axis(s, data):
    s, taken, g = stacked(s, data)
    pairs = [(i, (i + 1) % 16) for i in range(16)]
    other = jax.vmap(lambda row: jax.lax.ppermute(row, "rows", pairs), axis_name="rows")(g)
    return apply(s, masked(taken, other))


@leaks
def applies_a_function_along_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.apply_along_axis(jnp.flip, 0, g)))


@leaks
def contracts_rows(s, data):
    s, taken, g = stacked(s, data)
    return apply(s, masked(taken, jnp.einsum("ij,kj,kl->il", g, g, g)))


@leaks
def converts_a_closure_over_the_batch(s, data):
    s, _, taken = sample(s, data)

    def own(w, row):
        return jnp.sum((w - row - taken.examples["x"].mean(0)) ** 2)

    converted, consts = jax.closure_convert(own, s.params["w"], data["x"][0])

    def loss_fn(p, r):
        return converted(p["w"], r["x"], *consts)

    return apply(s, gradients(s.params, taken, loss_fn))


@leaks
def offloads_a_checkpoint_of_the_batch(s, data):
    s, _, taken = sample(s, data)

    @jax.checkpoint
    def own(w, row):
        return jnp.sum((w - row) ** 2) + jnp.sum(taken.examples["x"][0] * w)

    return apply(s, gradients(s.params, taken, lambda p, r: own(p["w"], r["x"])))


@leaks
def linearizes_at_the_data(s, data):
    _, tangent = jax.linearize(lambda w: jnp.sum((data["x"] - w) ** 2), s.params["w"])
    return changed(honest(s, data), tangent(jnp.ones(WIDTH)))


@leaks
def takes_a_mask_of_another_batch(s, data):
    s, first, _ = sample(s, data)
    s, second, _ = sample(s, data)
    taken = take(data, Batch(first.indices, second.mask))
    return apply(s, gradients(s.params, taken))


@leaks
def masks_all_data_by_a_batch(s, data):
    s, batch, _ = sample(s, data)
    grads = gradients(s.params, data, mask=jnp.zeros(N, bool).at[batch.indices].set(batch.mask))
    return apply(s, grads)


@leaks
def orders_the_batch_by_labels(s, data):
    s, _, taken = sample(s, data)
    order = jnp.argsort(taken.examples["y"])
    rows = jax.tree.map(lambda leaf: leaf[order], taken.examples)
    return apply(s, gradients(s.params, rows, mask=taken.mask[order]))


@leaks
def takes_rows_by_a_loop_over_the_batch(s, data):
    s, _, taken = sample(s, data)

    def body(i, g):
        row = jax.tree.map(lambda leaf: leaf[i], taken.examples)
        return jax.tree.map(jnp.add, g, jax.grad(loss)(s.params, row))

    total = jax.lax.fori_loop(0, 16, body, s.params)
    return apply(s, {"w": jnp.broadcast_to(total["w"], (1, WIDTH))})


# Optimizers that see more than releases


def outside(s, data, tx):
    """A step whose optimizer also gets the loss of the batch."""
    s, _, taken = sample(s, data)
    losses, grads = dpoptax.value_and_per_example_grads(loss)(s.params, taken)
    released, first = TX.update(grads, s.opt_state, s.params)
    updates, state = tx.update(released, tx.init(s.params), s.params, value=jnp.mean(losses))
    params = optax.apply_updates(s.params, updates)
    return s._replace(params=params, opt_state=first), state


@leaks
def takes_steps_by_the_loss(s, data):
    return outside(s, data, optax.polyak_sgd())


@leaks
def searches_a_step_size_on_the_data(s, data):
    tx = optax.scale_by_backtracking_linesearch(5)

    def value(p):
        return jnp.mean((data["x"] - p["w"]) ** 2)

    s = honest(s, data)
    state = tx.init(s.params)
    updates, _ = tx.update(
        s.params, state, s.params, value=value(s.params), grad=s.params, value_fn=value
    )
    return changed(s, updates["w"])


@leaks
def injects_a_rate_from_the_data(s, data):
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    state = tx.init(s.params)
    state = state._replace(hyperparams={"learning_rate": jnp.std(data["x"])})
    s = honest(s, data)
    updates, _ = tx.update(s.params, state, s.params)
    return changed(s, updates["w"])


@leaks
def skips_steps_with_infinite_gradients(s, data):
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    tx = optax.conditionally_transform(
        optax.sgd(0.1), lambda _, raw: jnp.all(jnp.isfinite(raw)), forward_extra_args=True
    )
    released, state = TX.update(grads, s.opt_state, s.params)
    updates, _ = tx.update(released, tx.init(s.params), s.params, raw=grads.global_squared_norms())
    return changed(s, updates["w"])._replace(opt_state=state)


@leaks
def starts_a_quantile_at_the_median_norm(s, data):
    tx = privatize(clip=dpoptax.clipping.QuantileClip(1.0), key=3)
    s, _, taken = sample(s, data)
    grads = gradients(s.params, taken)
    key, use = jax.random.split(s.key)
    state = tx.init(s.params)._replace(key=use)
    median = jnp.median(grads.global_squared_norms())
    state = state._replace(clip_state=jax.tree.map(lambda _: median, state.clip_state))
    updates, _ = tx.update(grads, state, s.params)
    return changed(s, updates["w"])._replace(key=key)

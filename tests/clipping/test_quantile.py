"""Adaptive clipping: the bound finds the quantile, and its count is paid for by the plan."""

import math
import pickle

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry
import scipy.stats
from eight_devices import run_on_eight_devices
from flax import nnx, serialization

import dpoptax
from dpoptax.clipping import QuantileClip
from dpoptax.clipping._count_noise import split_noise
from dpoptax.mechanisms import DiscreteGaussian, Gaussian
from dpoptax.schedules import Schedule
from dpoptax.training._diagnostics import rule_of_step

# Gradients of known norms: a scalar parameter, one number per example.
NORMS = jnp.arange(1.0, 101.0)


def transformation(clip, noise_multiplier=1.0, size=100.0, seed=0, **options):
    return dpoptax.privatize(
        clip, noise_multiplier, expected_batch_size=size, key=jax.random.key(seed), **options
    )


def bounds(tx, gradients, num_steps):
    """Returns the bound after each step, on the same batch of scalar gradients."""
    params = jnp.zeros(())

    @jax.jit
    def run(state, gradients):
        def step(state, _):
            _, state = tx.update(gradients, state, params)
            return state, state.clip_state.l2_clip

        return jax.lax.scan(step, state, None, length=num_steps)[1]

    return np.asarray(run(tx.init(params), gradients))


def plan(clip, noise_multiplier=1.3, sampler=None, num_steps=20):
    sampler = dpoptax.samplers.Poisson(200, 20) if sampler is None else sampler
    return dpoptax.Plan(
        sampler=sampler, clip=clip, noise_multiplier=noise_multiplier, num_steps=num_steps,
        delta=1e-4,
    )  # fmt: skip


# The bound finds the quantile.


@pytest.mark.parametrize(("quantile", "initial"), [(0.5, 1e-3), (0.9, 1e4), (0.1, 50.0)])
def test_without_noise_the_bound_ends_between_the_two_norms_around_the_quantile(quantile, initial):
    clip = QuantileClip(initial, quantile=quantile)
    last = bounds(transformation(clip, 0.0), NORMS, 400)[-1]
    below = round(100 * quantile)
    assert NORMS[below - 1] <= last < NORMS[below]


@pytest.mark.slow
@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_with_noise_the_bound_wanders_around_the_quantile(quantile):
    found = bounds(transformation(QuantileClip(1.0, quantile=quantile), 4.0), NORMS, 4000)[500:]
    fractions = np.searchsorted(np.asarray(NORMS), found, side="right") / 100
    # Steps of the logarithm sum up to its change, so the mean misses by (change / rate + noise).
    change = abs(math.log(found[-1] / found[0])) / 0.2 / len(found)
    noise = 4.5 * 20.0 / 100 / math.sqrt(len(found))
    assert abs(fractions.mean() - quantile) < change + noise
    assert fractions.std() > 0.005  # there is noise


def test_the_expected_batch_size_is_the_divisor_and_never_the_realised_one():
    def change(real, size):
        tx = transformation(QuantileClip(10.5, quantile=0.3), 0.0, size=size)
        return math.log(bounds(tx, NORMS[:real], 1)[0] / 10.5) / -0.2

    for real, size in ((50, 80.0), (20, 80.0)):
        fraction = 0.5 + (10 - real / 2) / size
        assert change(real, size) == pytest.approx(fraction - 0.3, abs=1e-5)


@pytest.mark.parametrize("votes", [-1e38, -math.inf, 0.0, 1e38, math.inf])
@pytest.mark.parametrize("initial", [1e-12, 1.0, 1e12])
def test_no_noise_makes_the_bound_zero_infinite_or_nan(votes, initial):
    clip = QuantileClip(initial, learning_rate=10.0)
    state = clip.update(clip.init(), jnp.float32(votes), 1.0)
    assert float(state.l2_clip) == pytest.approx(np.clip(state.l2_clip, 1e-12, 1e12), rel=1e-6)
    scale = clip.at(state).weights({"w": jnp.array([0.0, 1.0, 1e30, math.nan])})
    assert np.all(np.isfinite(scale))


# What it costs.


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special", "replace_one"])
def test_epsilon_is_that_of_the_two_queries_computed_by_hand(relation):
    """A full batch: a vector-valued Gaussian, whose delta has a closed form."""
    clip, steps, delta = QuantileClip(3.0, count_noise=1.1), 5, 1e-4
    sampler = dpoptax.samplers.Poisson(200, 200)
    if relation == "replace_special":
        sampler = dpoptax.samplers.Shuffled(200, 200)
    found = plan(clip, 1.7, sampler, steps)
    # One step moves the sum by a bound, and the count of shifted indicators by one half.
    moves = 2 if relation == "replace_one" else 1
    gradient = moves * 3.0 / (3.0 * found.gradient_noise_multiplier)
    count = moves * 0.5 / 1.1
    mu = math.sqrt(steps * (gradient**2 + count**2))

    def delta_of(epsilon):
        normal = scipy.stats.norm.cdf
        return normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)

    epsilon = found.epsilon(delta=delta, relation=relation)
    assert delta_of(epsilon * (1 + 1e-4)) <= delta <= delta_of(epsilon * 0.995)
    # The gradients alone would be cheaper, and the count is not free.
    mu = math.sqrt(steps) * gradient
    assert delta_of(epsilon * 0.995) < delta / 1.5


@pytest.mark.parametrize("name", registry.SAMPLERS)
def test_under_every_sampler_the_step_is_one_gaussian_query(name):
    """Its multiplier is one over the joint sensitivity, in standard deviations."""
    clip, sampler = QuantileClip(1.0, count_noise=2.0), registry.SAMPLERS[name](200, 20)
    found = plan(clip, 1.3, sampler)
    joint = math.hypot(1 / found.gradient_noise_multiplier, 0.5 / 2.0)
    assert 1 / joint == pytest.approx(1.3, rel=1e-14)
    ledger = found.ledger()
    ledger.charge(found.noise_multiplier, 20)
    for event in (found.event(), ledger.event()):
        assert event == sampler.event(1.3, 20, sampler.relation)


def test_epsilon_agrees_with_dp_accounting_under_poisson_sampling():
    found = plan(QuantileClip(1.0, count_noise=1.0), 1.3)
    joint = math.hypot(1 / found.gradient_noise_multiplier, 0.5 / 1.0)
    accountant = dp_accounting.pld.PLDAccountant()
    gaussian = dp_accounting.GaussianDpEvent(1 / joint)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, gaussian), 20)
    assert found.epsilon() == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-3)


def test_the_split_is_exact_and_wastes_nothing():
    from fractions import Fraction

    for noise in (1e-6, 0.3, 1.0, 1.1, 7.0, 1e5):
        for count in (None, 0.5000001 * noise, 0.7 * noise, 30 * noise):
            split = split_noise(noise, count)
            spent = Fraction(split.gradients) ** -2 + Fraction(split.votes) ** -2
            assert spent <= Fraction(noise) ** -2
            assert spent >= Fraction(noise) ** -2 * (1 - Fraction(1, 10**9))


def test_a_schedule_of_the_noise_is_split_step_by_step():
    noise = Schedule((2.0, 0.0, 1.0), (3, 2, 5))
    split = split_noise(noise, 4.0)
    assert split.gradients.lengths == split.votes.lengths == noise.lengths
    assert split.votes.values == (8.0, 0.0, 8.0)
    assert split.gradients.values[1:] == (0.0, split_noise(1.0, 4.0).gradients)
    tx = transformation(QuantileClip(10.5, count_noise=4.0), noise)
    found = bounds(tx, NORMS, 10)
    quiet = bounds(transformation(QuantileClip(float(found[2])), 0.0), NORMS, 2)
    np.testing.assert_allclose(found[3:5], quiet, rtol=1e-5)
    clip = QuantileClip(1.0, count_noise=4.0)
    steps = plan(clip, lambda step: 2.0 - 0.05 * step)
    assert len(steps.gradient_noise_multiplier.values) == 20
    assert steps.event() == steps.replace(clip=1.0).event()


# The noise that is drawn.


@pytest.mark.seconds
@pytest.mark.parametrize("mechanism", [Gaussian(), Gaussian(num_draws=2), DiscreteGaussian()])
def test_both_noises_have_the_stated_scale_and_are_independent(mechanism):
    clip, size = QuantileClip(2.0, count_noise=1.5, learning_rate=0.01), 400
    tx = transformation(clip, 1.2, size=1.0, mechanism=mechanism)
    params = jnp.zeros(size)

    @jax.jit
    def run(state):
        def step(state, _):
            noise, after = tx.update(jnp.zeros((1, size)), state, params)
            l2_clip = state.clip_state.l2_clip
            return after, (noise / l2_clip, jnp.log(after.clip_state.l2_clip / l2_clip))

        return jax.lax.scan(step, state, None, length=400)[1]

    gradient, log_ratios = jax.tree.map(np.asarray, run(tx.init(params)))
    count = log_ratios / -0.01 - 0.5  # an example without a gradient is below every bound
    stddev = split_noise(1.2, 1.5).gradients
    assert abs(gradient.std() / stddev - 1) < 4.5 / math.sqrt(2 * gradient.size)
    assert abs(count.std() / 1.5 - 1) < 4.5 / math.sqrt(2 * len(count))
    assert abs(count.mean()) < 4.5 * 1.5 / math.sqrt(len(count))
    columns = np.corrcoef(np.column_stack([count, gradient]), rowvar=False)[0, 1:]
    assert np.abs(columns).max() < 5 / math.sqrt(len(count))
    rows = np.corrcoef(gradient[:20])[np.triu_indices(20, 1)]
    assert np.abs(rows).max() < 5 / math.sqrt(size)


def test_another_bound_in_the_state_means_other_noise():
    """Equal noise in other units would reveal the difference of two sums."""
    params, zeros = jnp.zeros(100), jnp.zeros((1, 100))
    noise, counts = [], []
    for bound in (1.0, 1.0, 2.0):
        tx = transformation(QuantileClip(1.0))
        state = tx.init(params)
        state = state._replace(clip_state=state.clip_state._replace(l2_clip=jnp.float32(bound)))
        released, after = jax.jit(tx.update)(zeros, state, params)
        noise.append(np.asarray(released) / bound)
        counts.append(float(after.clip_state.l2_clip) / bound)
    np.testing.assert_array_equal(noise[0], noise[1])
    assert counts[0] == counts[1] != counts[2]
    assert abs(np.corrcoef(noise[0], noise[2])[0, 1]) < 4.5 / math.sqrt(100)


@pytest.mark.seconds
def test_every_field_of_the_rule_changes_the_noise():
    params, zeros, found = jnp.zeros(100), jnp.zeros((1, 100)), []
    fields = {"quantile": 0.4, "learning_rate": 0.1, "count_noise": 5.0}
    for change in ({}, *({name: value} for name, value in fields.items())):
        tx = transformation(QuantileClip(1.0, **change))
        found.append(np.asarray(jax.jit(tx.update)(zeros, tx.init(params), params)[0]))
    correlations = np.corrcoef(found)[np.triu_indices(len(found), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(100)


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantile": 0.0}, "quantile is the fraction.*strictly between 0 and 1; got 0.0"),
        ({"quantile": 1.0}, "strictly between 0 and 1; got 1.0"),
        ({"quantile": -0.5}, "strictly between 0 and 1"),
        ({"quantile": math.nan}, "quantile must be a number"),
        ({"initial": 0.0}, "initial must be positive and finite"),
        ({"initial": -1.0}, "initial must be positive"),
        ({"initial": math.inf}, "initial must be positive and finite"),
        ({"initial": 1e-13}, "the range of the bound.*Scale the loss"),
        ({"initial": 1e13}, "the range of the bound"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": 11.0}, "at most 10; got 11.0. A usual choice"),
        ({"count_noise": 0.0}, "count_noise must be positive"),
        ({"count_noise": -2.0}, "count_noise must be positive"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantileClip(**arguments)


@pytest.mark.parametrize("noise", [1.0, Schedule((0.5, 1.0), (2, 2))])
def test_a_count_that_costs_more_than_the_step_is_refused(noise):
    for count in (0.5, 0.2):
        clip = QuantileClip(1.0, count_noise=count)
        for make in (transformation, plan):
            with pytest.raises(ValueError, match=r"exceed half of noise_multiplier, .*; got.*lea"):
                make(clip, noise)
    assert plan(QuantileClip(1.0, count_noise=0.51), noise).epsilon() < math.inf


def test_a_class_in_place_of_a_rule_is_refused():
    with pytest.raises(TypeError, match=r"got the class QuantileClip\. Make a value"):
        plan(QuantileClip)


@pytest.mark.parametrize("bits", [4, 24])
def test_a_grid_that_does_not_fit_the_count_is_refused(bits):
    clip, noise = (QuantileClip(1.0, count_noise=100.0), 1.0), (QuantileClip(1.0), 1e-3)
    clip, noise = clip if bits == 4 else noise
    message = "too coarse for a count" if bits == 4 else "a sum of 1000 votes.*may not fit"
    mechanism = DiscreteGaussian(bits=bits)
    votes = split_noise(noise, clip.count_noise).votes
    with pytest.raises(ValueError, match=message):
        mechanism.release_votes(jax.random.key(0), jnp.int32(0), votes, 0, 1000)


@attrs.frozen
class NoVotes:
    """A mechanism of the user's own, made before there were clip rules with state."""

    caveat = "none"

    def release(self, key, grads, clip, noise_multiplier, step):
        return Gaussian().release(key, grads, clip, noise_multiplier, step)

    def check(self, clip, noise_multiplier):
        pass


def test_a_mechanism_without_votes_is_refused_for_rules_with_state_only():
    transformation(1.0, mechanism=NoVotes())
    with pytest.raises(TypeError, match=r"QuantileClip has state.*release_votes; got NoVotes"):
        transformation(QuantileClip(1.0), mechanism=NoVotes())


# The state.


def test_a_state_of_another_rule_is_refused():
    params = jnp.zeros(2)
    flat, adaptive = transformation(1.0), transformation(QuantileClip(1.0), seed=1)
    grads = jnp.ones((3, 2))
    flat_state, adaptive_state = flat.init(params), adaptive.init(params)
    assert jax.tree.leaves(flat_state.clip_state) == []
    for tx, state in ((flat, adaptive_state), (adaptive, flat_state)):
        with pytest.raises(ValueError, match=r"expected a state of the clip rule.*got a state of"):
            jax.eval_shape(tx.update, grads, state, params)
    # States of flat rules from before there were states of rules.
    old = type(flat_state)(flat_state.step, flat_state.key)
    flat.update(grads, old, params)


def test_a_state_says_its_bound_and_hides_its_key():
    params = jnp.zeros(2)
    assert "clip_state" not in repr(transformation(1.0).init(params))
    state = transformation(QuantileClip(0.25)).init(params)
    assert "l2_clip=Array(0.25" in repr(state)
    assert "key=<not shown>" in repr(state)
    assert float(optax.tree_utils.tree_get((state, ()), "l2_clip")) == 0.25


def test_saved_states_keep_the_bound_and_old_ones_are_refused_by_name():
    params = jnp.zeros(2)
    state = transformation(QuantileClip(0.25)).init(params)
    kept = pickle.loads(pickle.dumps(state))
    assert float(kept.clip_state.l2_clip) == 0.25
    plain = dpoptax.random.key_data(state)
    stored = serialization.to_state_dict(plain)
    restored = serialization.from_bytes(plain, serialization.msgpack_serialize(stored))
    assert float(restored.clip_state["l2_clip"] if isinstance(restored.clip_state, dict)
                 else restored.clip_state.l2_clip) == 0.25  # fmt: skip
    del stored["clip_state"]
    with pytest.raises(ValueError, match="clip_state"):
        serialization.from_state_dict(plain, stored)


@pytest.mark.slow
def test_the_optimizer_of_nnx_carries_the_state():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    tx = optax.chain(transformation(QuantileClip(1e-3), 0.0, size=8.0), optax.sgd(0.1))
    optimizer = dpoptax.nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss_fn, params = dpoptax.nnx.loss_fn(model, lambda model, x: jnp.sum(model(x) ** 2))
    grads = dpoptax.per_example_grads(loss_fn)(params, jnp.ones((8, 3)))
    for _ in range(2):
        optimizer.update(model, grads)
    leaves = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    # All eight are clipped, so the bound grows by exp(.2 * .5) twice.
    assert any(np.allclose(np.asarray(leaf), 1e-3 * math.exp(0.2), rtol=1e-5) for leaf in leaves
               if jnp.issubdtype(leaf.dtype, jnp.floating))  # fmt: skip


# The plan, the report and a run.


def test_a_plan_and_its_report_say_what_the_rule_does():
    found = plan(QuantileClip(0.7, quantile=0.4), num_steps=2)
    again = dpoptax.Plan.from_json(found.to_json())
    assert again == found
    gradients = found.gradient_noise_multiplier
    assert gradients == pytest.approx(1.3 / math.sqrt(0.99))
    report = dpoptax.Report.from_plan(found)
    assert report.epsilon == found.epsilon()
    text = " ".join(str(report).split())
    assert "QuantileClip (initial 0.7, quantile 0.4, learning_rate 0.2, count_noise 6.5)" in text
    assert "It follows noisy counts, one of each step" in text
    assert f"1.3 of the gradient and the count together, {gradients:.6g} of the gradient" in text
    assert "every noisy count" in report.released
    assert '"gradient_noise_multiplier": 1.306' in report.to_json()
    flat = plan(0.7)
    assert flat.gradient_noise_multiplier == 1.3
    assert dpoptax.Report.from_plan(flat).gradient_noise_multiplier is None
    silent = plan(QuantileClip(0.7), 0.0)
    assert silent.epsilon() == math.inf
    assert "of the gradient and the count" in " ".join(
        str(dpoptax.Report.from_plan(silent)).split()
    )


def test_a_ledger_is_not_continued_with_another_rule():
    ledger = plan(QuantileClip(0.7)).ledger()
    ledger.charge(1.3)
    sampler = ledger.sampler
    for clip in (0.7, QuantileClip(0.7, quantile=0.4)):
        with pytest.raises(ValueError, match="this ledger has the clip QuantileClip"):
            type(ledger).from_json(ledger.to_json(), sampler=sampler, clip=clip)
    again = type(ledger).from_json(ledger.to_json(), sampler=sampler, clip=QuantileClip(0.7))
    assert again.epsilon() == ledger.epsilon()


def loss_fn(params, x):
    return jnp.sum(params * x)


DATA = jnp.geomspace(0.01, 10.0, 40)[:, None] * jnp.ones((40, 3))


ADAPTIVE = QuantileClip(0.1)


def fit(clip=ADAPTIVE, steps=6, noise_multiplier=1.0, **options):
    settings = {"progress": False, "optimizer": optax.sgd(0.1), "key": jax.random.key(0)} | options
    sampler = dpoptax.samplers.Poisson(40, 20)
    found = plan(clip, noise_multiplier, sampler, steps)
    return dpoptax.training.fit(loss_fn, jnp.zeros(3), DATA, plan=found, **settings)


@pytest.mark.slow
def test_a_run_shows_its_bound_and_diagnoses_with_it():
    seen = []
    every = dpoptax.training.Every(seen.append, steps=1)
    result = fit(diagnostics=True, progress=[every], noise_multiplier=0.0)
    assert [one.l2_clip for one in seen][-1] == float(result.state.opt_state[0].clip_state.l2_clip)
    bound = 0.1
    for one in seen:
        # The bound before the step clipped; the realised batch is a part of all examples.
        clipped = float(one.nonprivate.nonprivate_clip_fraction)
        size = int(one.nonprivate.nonprivate_batch_size)
        change = math.log(one.l2_clip / bound) / -0.2 + 0.5
        assert change == pytest.approx(0.5 + ((1 - clipped) * size - size / 2) / 20, abs=1e-4)
        bound = one.l2_clip
    assert 0.1 < bound < math.sqrt(3) * DATA.max()


def test_diagnostics_by_another_rule_are_refused_and_flat_rules_show_no_bound():
    state = transformation(1.0).init(jnp.zeros(()))
    with pytest.raises(ValueError, match="Pass the clip rule of tx as diagnostics"):
        rule_of_step(ADAPTIVE, (state, ()))
    assert dpoptax.training._progress._bound_of(dpoptax.clipping.FlatClip(1.0), state) is None
    assert rule_of_step(dpoptax.clipping.FlatClip(1.0), state).l2_clip == 1.0


@pytest.mark.slow
def test_a_run_resumes_with_its_bound_and_not_with_another_rule(tmp_path):
    def stop(progress):
        return progress.step >= 3

    whole = fit()
    first = fit(resume=tmp_path / "run", progress=dpoptax.training.Every(stop, steps=3))
    assert first.num_steps == 3
    for clip in (0.1, QuantileClip(0.2), QuantileClip(0.1, count_noise=4.0)):
        with pytest.raises(ValueError, match="holds a run with another clip"):
            fit(clip, resume=tmp_path / "run")
    rest = fit(resume=tmp_path / "run")
    np.testing.assert_array_equal(rest.params, whole.params)
    np.testing.assert_array_equal(
        rest.state.opt_state[0].clip_state.l2_clip, whole.state.opt_state[0].clip_state.l2_clip
    )


@pytest.mark.slow
def test_microbatches_and_own_loops_give_the_run_of_fit():
    whole = fit()
    parts = fit(microbatch_size=7)
    automatic = fit(microbatch_size="auto")
    bound = whole.state.opt_state[0].clip_state.l2_clip
    for other in (parts, automatic):
        np.testing.assert_allclose(other.params, whole.params, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(other.state.opt_state[0].clip_state.l2_clip, bound)
    run = dpoptax.training.PrivateRun(
        loss_fn, jnp.zeros(3), DATA, plan=plan(QuantileClip(0.1), 1.0, whole.plan.sampler, 6),
        optimizer=optax.sgd(0.1), key=jax.random.key(0),
    )  # fmt: skip
    for _ in run:
        pass
    np.testing.assert_array_equal(run.params, whole.params)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", [Gaussian(), DiscreteGaussian(bits=12)])
def test_the_count_takes_no_pass_of_its_own(mechanism):
    """XLA counts the body of a loop once, so this is the work for one microbatch."""
    width, tokens, size = 64, 16, 4

    def loss_fn(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    def flops(clip):
        tx = transformation(clip, mechanism=mechanism)
        w = jnp.zeros((width, width))
        x = jax.ShapeDtypeStruct((2 * size, tokens, width), jnp.float32)
        grads_fn = dpoptax.per_example_grads(loss_fn, microbatch_size=size)
        step = jax.jit(lambda w, x, state: tx.update(grads_fn(w, x), state, w))
        return step.lower(w, x, tx.init(w)).compile().cost_analysis()["flops"]

    forward = 2 * size * tokens * width**2
    assert flops(QuantileClip(1.0)) == pytest.approx(flops(1.0), abs=0.1 * forward)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, optax, dpoptax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

x = np.geomspace(0.01, 10.0, 32)[:, None].astype(np.float32) * np.ones((32, 16), np.float32)
found = []
for kind in (None, AxisType.Auto, AxisType.Explicit):
    params, data = jnp.zeros(16), jnp.asarray(x)
    if kind is not None:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
        params = jax.device_put(params, NamedSharding(mesh, P()))
        data = jax.device_put(data, NamedSharding(mesh, P("data")))
    for size in (None, 8):
        tx = dpoptax.privatize(dpoptax.clipping.QuantileClip(1.0), 1.0, expected_batch_size=32,
                               key=jax.random.key(0))
        grads_fn = dpoptax.per_example_grads(
            lambda w, x: jnp.sum(jnp.sin(w) * x), microbatch_size=size)
        step = jax.jit(lambda params, data, state: tx.update(grads_fn(params, data), state, params))
        state = tx.init(params)
        for _ in range(2):
            updates, state = step(params, data, state)
        found.append((np.asarray(updates), np.asarray(state.clip_state.l2_clip)))
for updates, bound in found:
    np.testing.assert_allclose(updates, found[0][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(bound, found[0][1])
assert found[0][1] != 1.0
print("one bound on one and on eight devices")
"""


@pytest.mark.e2e
def test_eight_devices_count_what_one_counts_on_every_mesh():
    printed = run_on_eight_devices(EIGHT_DEVICES, JAX_NUMPY_DTYPE_PROMOTION="strict")
    assert "one bound on one and on eight devices" in printed

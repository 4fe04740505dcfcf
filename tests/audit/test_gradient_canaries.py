"""Gradient canaries take part as the sampler draws them, at the clip bound, and are scored so.

The model of most tests has many parameters and almost no gradient. So the law of the scores is that
of the canaries and the noise alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import registry

import dpoptax
from dpoptax.audit import GradientCanaries
from dpoptax.clipping import PerLayerClip, QuantileClip
from dpoptax.schedules import Schedule, as_schedule
from dpoptax.training import Checkpoints, Every, HostData, _audited, fit
from dpoptax.transforms import disk, scale_then_privatize

CANARIES, ROWS, BATCH, STEPS = 60, 12, 24, 4
NUM_EXAMPLES = CANARIES + ROWS
DATA = np.ones((ROWS, 3), np.float32)
POISSON = dpoptax.samplers.Poisson(NUM_EXAMPLES, BATCH)


def params():
    return {"w": jnp.zeros((20, 5)), "b": jnp.zeros(3), "s": jnp.zeros(())}


def loss(params, x):
    return 1e-12 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * jnp.sum(x)


def plan(**changes):
    """A plan without noise."""
    arguments = {"sampler": POISSON, "clip": 0.5, "noise_multiplier": 0.0, "num_steps": STEPS}
    return dpoptax.Plan(**(arguments | {"delta": 1e-3} | changes))


def run(plan, data=DATA, **changes):
    options = {"optimizer": optax.sgd(0.1), "progress": False, "key": jax.random.key(0)}
    options["audit"] = GradientCanaries(CANARIES)
    return fit(loss, params(), data, plan=plan, **(options | changes))


# Who takes part

ALL_SAMPLERS = [
    pytest.param(name, marks=[] if name == "poisson" else pytest.mark.slow)
    for name in registry.SAMPLERS
    if "user" not in name
]


@pytest.mark.seconds
@pytest.mark.parametrize("name", ALL_SAMPLERS)
def test_canaries_that_are_in_take_part_as_the_sampler_draws_them(name):
    sampler = registry.SAMPLERS[name](NUM_EXAMPLES, BATCH)
    audit = run(plan(sampler=sampler)).audit
    # Without noise, a score is clip / size for each step in which the canary takes part.
    size = float(as_schedule(sampler.expected_batch_size).max)
    inside, outside = audit.in_scores * size / 0.5, audit.out_scores * size / 0.5
    np.testing.assert_allclose(outside, 0, atol=1e-3)
    np.testing.assert_allclose(inside, np.rint(inside), atol=1e-3)
    expected, spread = STEPS * size / NUM_EXAMPLES, (STEPS * 0.25 / len(inside)) ** 0.5
    assert abs(inside.mean() - expected) < 4 * spread
    assert len(inside) + len(outside) == CANARIES
    assert 15 < len(inside) < 45
    alone = ("poisson", "poisson, truncated", "poisson schedule", "cyclic poisson")
    assert audit.independent == (name in alone)


CHANGES = {
    "per layer": {"clip": PerLayerClip(0.5)},
    "AUTO-S": {"clip": dpoptax.clipping.AutoSClip(0.5)},
    "PSAC": {"clip": dpoptax.clipping.PsacClip(0.5)},
    "normalized": {"clip": dpoptax.clipping.NormalizedClip(0.5)},
    "quantile": {"clip": QuantileClip(0.5)},
    "scheduled clip": {"clip": Schedule((0.5, 5.0), (2, 2))},
    "discrete": {"mechanism": dpoptax.mechanisms.DiscreteGaussian(), "noise_multiplier": 0.005},
    "parts of 5": {"microbatch_size": 5, "diagnostics": True},
    "parts of 1": {"microbatch_size": 1},
    "scaled": {"optimizer": scale_then_privatize(optax.sgd(0.1))},
    "scaled by leaf": {"optimizer": scale_then_privatize(optax.sgd(0.1), per_leaf=True)},
    "disk": {"optimizer": disk(optax.sgd(0.1))},
}
SOME = [
    pytest.param(name, marks=[] if name == "parts of 5" else pytest.mark.slow) for name in CHANGES
]


@pytest.mark.seconds
@pytest.mark.parametrize("name", SOME)
def test_with_little_noise_who_took_part_is_plain_whatever_clips_sums_and_follows(name):
    of_plan = {"noise_multiplier": 1e-3}
    of_fit = {}
    for option, value in CHANGES[name].items():
        is_of_plan = option in ("clip", "mechanism", "noise_multiplier")
        (of_plan if is_of_plan else of_fit)[option] = value
    audit = run(plan(**of_plan), **of_fit).audit
    # A step in which a canary took part adds about r^2 / (2 z^2), if it reaches r clip bounds. Two
    # of the three layers have fewer coordinates than there are canaries.
    reached = 3**-0.5 if name == "per layer" else 1.0
    inside = audit.in_scores * 2 * (of_plan["noise_multiplier"] / reached) ** 2
    np.testing.assert_allclose(inside, np.rint(inside), atol=0.1)
    assert abs(inside.mean() - STEPS * BATCH / NUM_EXAMPLES) < 0.5
    assert np.all(audit.out_scores < 0)
    assert audit.independent == (name not in ("quantile", "discrete", "scaled", "scaled by leaf"))


@pytest.mark.seconds
def test_scores_are_the_likelihood_ratios_of_a_simulation():
    count, steps, noise, size = 2000, 5, 0.8, 500
    examples = count + ROWS
    sampler = dpoptax.samplers.Poisson(examples, size)
    made = fit(
        lambda w, x: 1e-12 * jnp.sum(w) * jnp.sum(x), jnp.zeros(2 * count), DATA,
        plan=plan(sampler=sampler, noise_multiplier=noise, num_steps=steps, delta=1e-4),
        optimizer=optax.sgd(0.1), key=jax.random.key(1), progress=False,
        audit=GradientCanaries(count),
    ).audit  # fmt: skip
    random, rate = np.random.default_rng(0), size / examples
    simulated = []
    for is_in in (True, False):
        taken = (random.random((40_000, steps)) < rate) & is_in
        x = random.standard_normal((40_000, steps)) + taken / noise
        ratio = np.exp(x / noise - 0.5 / noise**2)
        simulated.append(np.log(1 - rate + rate * ratio).sum(axis=1))
    for scores, expected in zip((made.in_scores, made.out_scores), simulated, strict=True):
        standard_error = expected.std() / len(scores) ** 0.5
        assert abs(scores.mean() - expected.mean()) < 4 * standard_error
        assert abs(scores.std() / expected.std() - 1) < 4 * len(scores) ** -0.5
    # The difference that the test above must see: half the noise, or a rate of one and a half.
    assert abs(simulated[0].mean() - simulated[1].mean()) > 8 * standard_error


@pytest.mark.slow
def test_what_real_examples_add_is_taken_away():
    def strong(w, x):
        return jnp.sum(w) * jnp.sum(x)

    options = {"plan": plan(noise_multiplier=1e-3), "optimizer": optax.sgd(0.0), "progress": False}
    options["audit"] = GradientCanaries(CANARIES)
    weak = fit(lambda w, x: 1e-12 * strong(w, x), jnp.zeros(200), DATA, key=jax.random.key(3),
               **options).audit  # fmt: skip
    audit = fit(strong, jnp.zeros(200), DATA, key=jax.random.key(3), **options).audit
    assert np.all(audit.out_scores < 0)
    assert np.all(weak.out_scores < 0)


# The run of an audit


@pytest.mark.slow
def test_data_on_the_host_give_the_same_audit():
    made = run(plan(noise_multiplier=1.0)).audit
    streamed = run(plan(noise_multiplier=1.0), HostData(DATA)).audit
    np.testing.assert_allclose(made.in_scores, streamed.in_scores, rtol=1e-5)
    np.testing.assert_allclose(made.out_scores, streamed.out_scores, rtol=1e-5)


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_audit_of_a_run_that_was_not(tmp_path):
    whole = run(plan(noise_multiplier=1.0))
    stop = Every(lambda progress: progress.step == 2, steps=2)
    first = run(plan(noise_multiplier=1.0), resume=Checkpoints(tmp_path), progress=stop)
    assert first.num_steps == 2
    # The function may have looked at the parameters: all planned steps count.
    assert first.audit.num_steps == STEPS
    second = run(plan(noise_multiplier=1.0), resume=Checkpoints(tmp_path))
    again = run(plan(noise_multiplier=1.0), resume=Checkpoints(tmp_path))
    for found in (second, again):
        np.testing.assert_array_equal(found.audit.in_scores, whole.audit.in_scores)
        assert found.audit.independent
    with pytest.raises(ValueError, match="another optimizer state"):
        run(
            plan(noise_multiplier=1.0), np.ones((NUM_EXAMPLES, 3), np.float32), audit=None,
            resume=Checkpoints(tmp_path),
        )  # fmt: skip


def noise_of_run(monkeypatch, coins, norm=None):
    """What a run of one step adds to the parameters, at coordinates without a canary."""
    started = _audited.start_audit

    def start(*arguments):
        made = started(*arguments)
        if coins is not None:
            made = made._replace(included=coins)
        return made

    monkeypatch.setattr("dpoptax.training._fit.start_audit", start)
    made = run(plan(noise_multiplier=1.0, num_steps=1), audit=GradientCanaries(CANARIES, norm=norm))
    monkeypatch.undo()
    return np.asarray(made.params["b"])


@pytest.mark.seconds
def test_other_coins_or_canaries_draw_other_noise(monkeypatch):
    # Leaf "b" has too few coordinates for canaries with a flat clip, if none falls there.
    coins = jnp.arange(CANARIES) % 2 == 0
    one = noise_of_run(monkeypatch, coins)
    np.testing.assert_array_equal(one, noise_of_run(monkeypatch, coins))
    others = [
        noise_of_run(monkeypatch, coins.at[3].set(True)),
        noise_of_run(monkeypatch, coins, norm=2e6),
    ]
    for other in others:
        assert np.all(other != one)


@pytest.mark.untyped
def test_canaries_have_coordinates_of_their_own():
    audit = GradientCanaries(103).start(None, params(), None, plan(), jax.random.key(0))
    b, s, w = audit.canaries.values
    counts = [int(np.count_nonzero(leaf)) for leaf in (b, s, w)]
    assert sum(counts) == 103
    assert counts[2] >= 99
    at = np.asarray(audit.canaries.positions[2])[np.asarray(w) != 0]
    assert len({tuple(row) for row in at}) == len(at)


# Refusals

REFUSED = {
    "size": ({}, {"data": DATA[:5]}, r"60 canaries.*65 = 5 rows \+ 60 canaries"),
    "users": (
        {"sampler": registry.SAMPLERS["user poisson"](NUM_EXAMPLES, BATCH)}, {},
        "UserPoisson draws users",
    ),
    "coordinates": (
        {"sampler": dpoptax.samplers.Poisson(ROWS + 200, BATCH)},
        {"audit": GradientCanaries(200)}, "at most 104 coordinates",
    ),
    "groups": ({"clip": PerLayerClip(0.5), "sampler": dpoptax.samplers.Poisson(ROWS + 101, BATCH)},
               {"audit": GradientCanaries(101)}, "at most 100 coordinates"),
    "no bound": ({"clip": np.inf}, {}, "finite bound"),
}  # fmt: skip


@pytest.mark.parametrize(("of_plan", "of_fit", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_audited_is_refused(of_plan, of_fit, message):
    with pytest.raises(ValueError, match=message):
        run(plan(**of_plan), **of_fit)


@pytest.mark.untyped
def test_something_else_than_canaries_is_refused():
    for audit in (1000, GradientCanaries):
        with pytest.raises(TypeError, match="audit must be canaries"):
            run(plan(), audit=audit)
    with pytest.raises(ValueError, match=r"num_canaries must be at least 1"):
        GradientCanaries(0)


@pytest.mark.seconds
def test_readings_of_examples_leave_out_canaries():
    seen = []
    # The loss of a padded row, which a canary has, has a large gradient.
    fit(
        lambda w, x: 100.0 * jnp.sum(w) * jnp.sum(1.0 - x), jnp.zeros(70), DATA,
        plan=plan(noise_multiplier=1.0, num_steps=1), optimizer=optax.sgd(0.1),
        key=jax.random.key(0), audit=GradientCanaries(CANARIES), progress=seen.append,
        diagnostics=True,
    )  # fmt: skip
    assert 0 < int(seen[-1].nonprivate.nonprivate_batch_size) < BATCH / 2
    assert float(seen[-1].nonprivate.nonprivate_clip_fraction) == 0
    assert float(seen[-1].nonprivate.nonprivate_median_norm) == 0


@pytest.mark.seconds
def test_scores_depend_on_each_other_if_batches_of_groups_are_cut():
    sampler = dpoptax.samplers.CyclicPoisson(NUM_EXAMPLES, BATCH, 2, max_batch_size=BATCH)
    assert not run(plan(sampler=sampler, noise_multiplier=1.0, num_steps=2)).audit.independent

"""Users whose examples are drawn in every step: who is drawn, and what a user costs."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from dp_accounting.pld import privacy_loss_distribution as pld
from inclusion import LEVEL

import dpoptax
from dpoptax._dp_events import LimitedPoissonDpEvent, poisson_group_event
from dpoptax.accounting import epsilon, event_epsilon
from dpoptax.accounting._compose import compositions
from dpoptax.accounting._mixture_of_gaussians import mixture_of_gaussians
from dpoptax.accounting._step_pld import step_distribution
from dpoptax.relations import parse_relation
from dpoptax.samplers import Poisson, UserExamplesPoisson, UserPoisson, draw_examples

IDS = np.array(["c", "a", "b", "a", "c", "a", "c", "c"])


def test_the_first_examples_of_each_user_are_kept_in_their_order():
    sampler = UserExamplesPoisson(IDS, 2, max_examples_per_user=2)
    data = {"x": jnp.arange(8), "y": np.arange(16).reshape(8, 2)}
    kept = sampler.arrange(data)
    np.testing.assert_array_equal(kept["x"], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(kept["y"][:, 0], [0, 2, 4, 6, 8])
    assert UserExamplesPoisson(IDS, 2, 9).num_examples == 8
    assert (sampler.num_examples, sampler.sampling_rate) == (5, 0.4)
    state = sampler.init(jax.random.key(0))
    batch, same = sampler.sample(state)[1], Poisson(5, 2).sample(state)[1]
    np.testing.assert_array_equal(batch.indices, same.indices)


@pytest.mark.parametrize(
    ("group", "rate", "noise", "grid_step"),
    [(1, 0.01, 0.7, 5e-3), (3, 0.4, 1.2, 2e-2), (20, 0.01, 3.0, 1e-2)],
)
def test_a_mixture_of_gaussians_agrees_with_dp_accounting(group, rate, noise, grid_step):
    event = poisson_group_event(rate, noise, group)
    ours = mixture_of_gaussians(event, grid_step)
    theirs = pld.from_mixture_gaussian_mechanism(
        noise, event.sensitivities, event.sampling_probs, value_discretization_interval=grid_step
    )
    for at in (-0.4, 0.0, 0.3, 1.0, 2.5):
        found, expected = (
            np.array([pmf.get_delta_for_epsilon(at) for pmf in (one._pmf_remove, one._pmf_add)])
            for one in (ours, theirs)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_large_groups_and_little_noise_have_an_epsilon():
    run = {"num_steps": 100, "delta": 1e-5}
    costs = [
        epsilon(sampler=Poisson(60_000, 128), noise_multiplier=noise, group_size=size, **run)
        for noise, size in ((1.1, 5), (1.1, 50), (0.1, 50))
    ]
    assert 0 < costs[0] < costs[1] < costs[2] < math.inf


def test_rare_moves_count_as_the_largest_one():
    probs = (0.9, 0.1 - 1e-23, 1e-23, 0.0)
    small = mixture_of_gaussians(MixtureOfGaussiansDpEvent(1.0, (0, 1, 2, 3), probs), 1e-2)
    large = mixture_of_gaussians(MixtureOfGaussiansDpEvent(1.0, (0, 1, 2), (0.9, 0.1, 0)), 1e-2)
    at = np.array([0.0, 1.0])
    first, second = (compositions([(one, 1)], 1e-2)[0].deltas(at) for one in (small, large))
    np.testing.assert_allclose(first, second, rtol=1e-9)


OUTPUTS = np.linspace(-14, 34, 12_001)


def density(users_moves, others, rate, largest, noise):
    """Of a noisy sum over a limited batch, by the definition of the batch."""
    moves = np.array([*users_moves, *others])
    total, fits = np.zeros_like(OUTPUTS), 0.0
    for joins in itertools.product([False, True], repeat=len(moves)):
        size = sum(joins)
        if size <= largest:
            weight = rate**size * (1 - rate) ** (len(moves) - size)
            total += weight * scipy.stats.norm.pdf(OUTPUTS, moves @ joins, noise)
            fits += weight
    return total / fits


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_special"])
@pytest.mark.parametrize("other_adds", [0.0, 8.0])
@pytest.mark.parametrize("largest", [3, 7])
def test_a_user_costs_at_least_what_the_exact_density_reveals(relation, other_adds, largest):
    ids, noise = np.array([0, 0, 0, 1, 2, 3, 4]), 1.1
    sampler = UserExamplesPoisson(ids, 2, 3, max_batch_size=largest)
    rate, others = sampler.sampling_rate, [other_adds] * 4
    event = sampler.event(noise, 1, relation).event
    loss = step_distribution(event, parse_relation(relation), 1e-2)
    removed, added = compositions([(loss, 1)], 1e-2)
    spacing = OUTPUTS[1] - OUTPUTS[0]
    # A user may have fewer examples, which may also point in other directions.
    for user in ([1.0] * 3, [1.0, 1.0], [1.0, -1.0, 1.0]):
        first = density(user, others, rate, largest, noise)
        empty = [] if relation == "add_or_remove_one" else [0.0] * len(user)
        second = density(empty, others, rate, largest, noise)
        for at in (-0.4, 0.2, 1.0, 2.5):
            for pair, bound in (((first, second), removed), ((second, first), added)):
                exact = np.maximum(pair[0] - math.exp(at) * pair[1], 0).sum() * spacing
                # The sum over the outputs has an error of about 1e-7.
                assert exact <= bound.deltas(np.array([at]))[0] + 1e-6


def test_the_guarantee_of_one_example_would_be_too_small_for_a_user():
    """The test above has power."""
    first, second = (density(user, [0.0] * 4, 2 / 7, 7, 1.1) for user in ([1.0] * 3, []))
    exact = np.maximum(first - math.e * second, 0).sum() * (OUTPUTS[1] - OUTPUTS[0])
    assert epsilon(sampler=Poisson(7, 2, 7), noise_multiplier=1.1, num_steps=1, delta=exact) < 0.8
    user = UserExamplesPoisson([0, 0, 0, 1, 2, 3, 4], 2, 3, 7)
    assert epsilon(sampler=user, noise_multiplier=1.1, num_steps=1, delta=exact) >= 1 - 1e-4


@pytest.mark.filterwarnings("ignore:delta should be well below")
def test_a_user_costs_what_a_group_of_its_examples_costs():
    ids = np.repeat(np.arange(100), 4)
    run = {"noise_multiplier": 1.0, "num_steps": 30, "delta": 1e-5}
    for size in (400, 28):
        user = epsilon(sampler=UserExamplesPoisson(ids, 20, 4, size), **run)
        assert user == epsilon(sampler=Poisson(400, 20, size), group_size=4, **run)
    event = UserExamplesPoisson(ids, 20, 4, 28).event(1.0, 30).event
    assert event == LimitedPoissonDpEvent(poisson_group_event(0.05, 1.0, 4), 400, 0.05, 28, 4)
    one = UserExamplesPoisson(range(400), 20, 1, 400).event(1.0, 30)
    example = epsilon(sampler=Poisson(400, 20, 400), **run)
    assert event_epsilon(one, delta=1e-5) == pytest.approx(example, rel=1e-4)


def test_a_plan_of_users_is_written_and_refuses_other_data_and_relations():
    sampler = UserExamplesPoisson(IDS, 2, max_examples_per_user=2)
    plan = dpoptax.Plan(sampler=sampler, clip=1.0, noise_multiplier=1.0, num_steps=3, delta=1e-3)
    again = dpoptax.Plan.from_json(plan.to_json())
    assert again.epsilon() == plan.epsilon() > 0
    with pytest.raises(ValueError, match="arrange needs the user of every example"):
        again.sampler.arrange(np.arange(8))
    with pytest.raises(ValueError, match="no guarantee under replace_one"):
        plan.epsilon(relation="replace_one")
    with pytest.raises(ValueError, match="data must have one row per entry of user_ids"):
        sampler.arrange(np.arange(7))
    with pytest.raises(ValueError, match=r"arrange\(data\)\), which leaves the others out"):
        dpoptax.training.fit(
            lambda w, x: w * x,
            jnp.ones(()),
            np.ones(8),
            plan=plan,
            optimizer=optax.sgd(0.1),
            key=jax.random.key(0),
        )


def test_examples_of_a_user_are_drawn_uniformly_without_replacement():
    mask = jnp.array([True, False, True, True, True, False])
    row = ({"x": jnp.arange(6)}, mask)
    keys = jax.random.split(jax.random.key(0), 6_000)
    taken, present = jax.jit(jax.vmap(lambda key: draw_examples(key, row, 2)))(keys)
    assert present.all()
    pairs = np.sort(np.asarray(taken["x"]), axis=1)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 6  # of the four examples that are there
    assert scipy.stats.chisquare(counts).pvalue > LEVEL


def test_a_user_with_few_examples_gives_all_of_them():
    mask = jnp.array([False, True, False, True])
    draw = jax.jit(lambda key: draw_examples(key, (jnp.arange(4), mask), 3))
    taken, present = draw(jax.random.key(1))
    assert sorted(np.asarray(taken)[np.asarray(present)].tolist()) == [1, 3]
    with pytest.raises(ValueError, match="count must be at most the number of places"):
        draw_examples(jax.random.key(1), (jnp.arange(4), mask), 5)


def test_a_loss_draws_other_examples_of_a_user_with_each_key():
    sampler = UserPoisson(np.repeat([0, 1], 8), 2, max_examples_per_user=8)
    rows = sampler.arrange(jnp.arange(16.0))

    def loss_fn(w, row, key):
        x, mask = draw_examples(key, row, 2)
        return w * jnp.sum(jnp.where(mask, x, 0)) / 2

    grads = dpoptax.per_example_grads(loss_fn)
    stacked = jax.jit(lambda key: grads(jnp.ones(()), rows, key=key).stacked())
    sums = {tuple(stacked(jax.random.key(seed)).tolist()) for seed in range(4)}
    assert len(sums) == 4
    assert all(0 <= first <= 7 and 8 <= second <= 15 for first, second in sums)

"""Clip rules: their formulas, their bounds for hostile gradients, and what they do not accept."""

import json
import math

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.clipping import (
    AutoSClip,
    FlatClip,
    GroupClip,
    NormalizedClip,
    PerLayerClip,
    PsacClip,
)
from dpoptax.clipping._flat import check_sensitivity
from dpoptax.mechanisms import DiscreteGaussian, Gaussian
from dpoptax.per_example._stacked import StackedGrads
from dpoptax.schedules import Schedule

SHAPES = {
    "a": jax.ShapeDtypeStruct((4,), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
}
C = 2.0
BOUNDS = {"a": 1.2, "b": 1.6}
RULES = {
    "flat": FlatClip(C),
    "group": GroupClip(BOUNDS),
    "per layer": PerLayerClip(C),
    "per layer, by size": PerLayerClip.by_size(C, SHAPES),
    "AUTO-S": AutoSClip(C),
    "PSAC": PsacClip(C),
    "normalized": NormalizedClip(C),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def contributions(rule, gradients):
    """The definitions of the papers, in float64."""
    norms = {name: np.linalg.norm(leaf) for name, leaf in gradients.items()}
    whole = math.hypot(*norms.values())
    bounds = {
        GroupClip: BOUNDS,
        PerLayerClip: dict.fromkeys("ab", C / math.sqrt(2))
        if getattr(rule, "sizes", None) is None
        else {"a": C * math.sqrt(4 / 7), "b": C * math.sqrt(3 / 7)},
    }.get(type(rule))
    if bounds is not None:
        scales = {name: min(1, bounds[name] / norms[name]) for name in norms}
    elif type(rule) is FlatClip:
        scales = dict.fromkeys(norms, min(1, C / whole))
    elif type(rule) is AutoSClip:
        scales = dict.fromkeys(norms, C / (whole + 0.01))
    elif type(rule) is PsacClip:
        scales = dict.fromkeys(norms, C / (whole + 0.1 / (whole + 0.1)))
    else:
        scales = dict.fromkeys(norms, C / whole)
    return {name: scales[name] * gradients[name] for name in gradients}


@every_rule
def test_a_rule_is_the_formula_of_its_paper(rule):
    generator = np.random.default_rng(0)
    for size in (0.003, 0.1, 0.5, 1.0, 30.0):
        gradients = {
            name: size * generator.normal(size=spec.shape) for name, spec in SHAPES.items()
        }
        row = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[None], gradients)
        grads = StackedGrads(row, jnp.ones(1, bool))
        found, expected = grads.clip_and_sum(rule.weights), contributions(rule, gradients)
        for name in SHAPES:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def hostile():
    """Gradients of two arrays that have broken clip rules, one per row."""
    generator = np.random.default_rng(1)
    directions = [generator.normal(size=7), np.ones(7), np.eye(7)[0], np.eye(7)[5]]
    sizes = [
        0.0,
        1e-25,
        3e-20,
        1e-15,
        1e-9,
        1e-3,
        C,
        C * (1 - 1e-7),
        C * (1 + 1e-7),
        40.0,
        1e15,
        1e25,
    ]
    rows = [size * one / np.linalg.norm(one) for one in directions for size in sizes]
    # Norms at the bound of each group; one group huge and the other tiny; and what is not finite.
    for a, b in [(1.2, 1.6), (C / 2**0.5, C / 2**0.5), (1e12, 1e-12), (1e-25, 1e12), (1e-6, 1e6),
                 (math.nan, 1.0), (1.0, math.inf), (1e30, 1.0), (1.0, 1e25)]:  # fmt: skip
        rows.append(np.concatenate([np.full(4, a / 2), np.full(3, b / math.sqrt(3))]))
    # All squares but one vanish in float32, so the computed norm is far below the norm.
    rows.append(1e-19 * np.array([1.2, 1, 1, 1, 1, 1, 1]))
    rows = np.asarray(rows, np.float32)
    rows = np.concatenate([rows, -rows])  # a replaced example may point the other way
    return {"a": jnp.asarray(rows[:, :4]), "b": jnp.asarray(rows[:, 4:])}


def moves(rule, mechanism):
    """How far the release moves if a row leaves, and the most if another row replaces it."""
    gradients = hostile()
    size = len(gradients["a"])
    everyone = jnp.ones((1, size), bool)
    masks = jnp.concatenate([everyone, ~jnp.eye(size, dtype=bool)])

    def release(mask):
        # One key, so that the noise of all releases is the same.
        noise = 0.0 if isinstance(mechanism, Gaussian) else 1.0
        grads = StackedGrads(gradients, mask)
        return mechanism.release(jax.random.key(0), grads, rule, noise, 0)

    released = jax.vmap(release)(masks)
    table = np.concatenate([np.asarray(leaf, np.float64) for leaf in released.values()], axis=1)
    assert np.isfinite(table).all()
    removed = np.linalg.norm(table[1:] - table[0], axis=1)
    replaced = max(np.linalg.norm(table[1:] - row, axis=1).max() for row in table[1:])
    return removed, replaced


@every_rule
@pytest.mark.parametrize(
    "mechanism", [Gaussian(), DiscreteGaussian()], ids=["Gaussian", "discrete"]
)
def test_law_7_hostile_examples_move_a_release_by_at_most_the_sensitivity(rule, mechanism):
    removed, replaced = moves(rule, mechanism)
    # The sum and the release are rounded to float32.
    slack = 1e-5 if isinstance(mechanism, Gaussian) else 1e-3
    assert removed.max() <= rule.sensitivity("add_or_remove_one") * (1 + slack)
    assert removed.max() <= rule.sensitivity("replace_special") * (1 + slack)
    assert replaced <= rule.sensitivity("replace_one") * (1 + slack)
    # The bounds are reached, so the test has power.
    assert removed.max() > 0.99 * rule.sensitivity("add_or_remove_one")
    assert replaced > 0.99 * rule.sensitivity("replace_one")


@attrs.frozen
class EachToTheWholeBound:
    """A wrong rule: each array is clipped to the bound of the whole gradient."""

    l2_clip: float

    def weights(self, squared_norms, step=0):
        return {
            name: FlatClip(self.l2_clip).weights({name: leaf})
            for name, leaf in squared_norms.items()
        }

    def sensitivity(self, relation):
        return FlatClip(self.l2_clip).sensitivity(relation)


@attrs.frozen
class NormalizedWithoutFloor(EachToTheWholeBound):
    """A wrong rule: squares that vanish in float32 make a gradient look smaller than it is."""

    def weights(self, squared_norms, step=0):
        norms = jnp.sqrt(sum(jax.tree.leaves(squared_norms)))
        return jnp.where(jnp.isfinite(norms) & (norms > 0), self.l2_clip / norms, 0.0)


def test_law_7_finds_wrong_rules():
    removed, _ = moves(EachToTheWholeBound(C), Gaussian())
    assert removed.max() > 1.2 * C
    removed, _ = moves(NormalizedWithoutFloor(C), Gaussian())
    assert removed.max() > 1.01 * C
    # The discrete mechanism does not depend on the rule: it drops what exceeds the bound.
    removed, _ = moves(EachToTheWholeBound(C), DiscreteGaussian())
    assert removed.max() <= C * (1 + 1e-3)


@every_rule
def test_an_example_that_is_not_finite_in_one_group_contributes_zero(rule):
    squares = jnp.array([1.0, math.nan, math.inf])
    for norms in ({"a": squares, "b": jnp.ones(3)}, {"a": jnp.ones(3), "b": squares}):
        for leaf in jax.tree.leaves(rule.weights(norms)):
            np.testing.assert_array_equal(leaf[1:], 0)
            assert leaf[0] > 0


@every_rule
def test_a_weight_follows_from_the_norms_of_its_own_example(rule):
    """Else one example more would also change what the others contribute."""
    norms = {"a": jnp.array([0.5, 9.0, 4.0]), "b": jnp.array([0.1, 4.0, 30.0])}
    one = jax.tree.map(lambda leaf: leaf[:1], norms)
    together, alone = rule.weights(norms), rule.weights(one)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:1], b), together, alone)


def test_the_largest_weight_of_psac():
    r = 0.1
    norms = np.linspace(0, 3, 300_001)
    weights = PsacClip(1.0, r).weights({"a": jnp.asarray(norms**2, jnp.float32)})
    assert abs(norms[np.argmax(weights)] - (math.sqrt(r) - r)) < 1e-2
    np.testing.assert_allclose(np.max(weights), 1 / (2 * math.sqrt(r) - r), rtol=1e-5)
    assert np.max(weights * norms) < 1


def with_bound(rule, l2_clip):
    if isinstance(rule, PerLayerClip):
        return PerLayerClip(l2_clip, rule.sizes)
    return attrs.evolve(rule, l2_clip=l2_clip)


@every_rule
def test_a_schedule_of_bounds_sets_weights_and_noise(rule):
    schedule = Schedule((C, C / 2), (3, 3))
    if isinstance(rule, GroupClip):
        scheduled = GroupClip(
            {"a": Schedule((1.2, 0.6), (3, 3)), "b": Schedule((1.6, 0.8), (3, 3))}
        )
    else:
        scheduled = with_bound(rule, schedule)
    norms = {"a": jnp.array([0.5, 9.0]), "b": jnp.array([0.1, 4.0])}
    for step, factor in ((0, 1), (2, 1), (3, 2), (9, 2)):
        found = scheduled.weights(norms, jnp.int32(step))
        # The bounds are halved: as if the norms were doubled, except for constants such as gamma.
        if isinstance(rule, GroupClip):
            expected = GroupClip({name: bound / factor for name, bound in BOUNDS.items()})
        else:
            expected = with_bound(rule, C / factor)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected.weights(norms)
        )
        assert dpoptax.schedules.as_schedule(scheduled.l2_clip).value_at(step) == pytest.approx(
            C / factor
        )
    assert scheduled.sensitivity("replace_one") == pytest.approx(2 * C)


def plan_of(rule, **changes):
    fields = {"sampler": dpoptax.samplers.Poisson(100, 10), "clip": rule, "noise_multiplier": 1.0,
              "num_steps": 3, "delta": 1e-3}  # fmt: skip
    return dpoptax.Plan(**(fields | changes))


@every_rule
def test_a_plan_is_read_and_its_report_and_ledger_name_the_rule(rule):
    plan = plan_of(rule)
    assert dpoptax.Plan.from_json(plan.to_json()) == plan
    assert hash(plan) == hash(dpoptax.Plan.from_json(plan.to_json()))
    report = dpoptax.Report.from_plan(plan, 0)
    assert f"{type(rule).__name__} (" in str(report)
    assert json.loads(report.to_json())["clip"]["kind"] == type(rule).__name__
    assert eval(repr(rule)) == rule
    with pytest.raises(ValueError, match=f"this ledger has the clip {type(rule).__name__}"):
        dpoptax.accounting.Ledger.from_json(
            plan.ledger().to_json(), sampler=plan.sampler, clip=FlatClip(C + 1)
        )


def test_groups_are_named_in_the_report():
    text = " ".join(str(dpoptax.Report.from_plan(plan_of(RULES["group"]), 0)).split())
    assert "GroupClip (bounds a: 1.2, b: 1.6)" in text
    many = GroupClip({f"layer {i}": 1.0 for i in range(40)})
    text = " ".join(str(dpoptax.Report.from_plan(plan_of(many), 0)).split())
    assert "layer 0: 1, layer 1: 1" in text
    assert "and 32 more" in text
    assert "layer 39" not in text


def test_rules_of_one_bound_have_noise_of_their_own():
    params = jax.tree.map(lambda spec: jnp.zeros(spec.shape), SHAPES)
    empty = StackedGrads(jax.tree.map(lambda leaf: leaf[None], params), jnp.zeros(1, bool))
    draws = []
    for rule in RULES.values():
        tx = dpoptax.privatize(rule, 1.0, expected_batch_size=1, key=jax.random.key(0))
        updates, _ = tx.update(empty, tx.init(params), params)
        draws.append(float(updates["a"][0]))
    assert len(set(draws)) == len(RULES)


@pytest.mark.parametrize(
    ("params", "bounds"),
    [
        ({"net": {"w": 0, "b": 0}, "head": [0, 0]}, {"net": 3.0, "head": (4.0, 12.0)}),
        ({"net": {"w": 0, "b": 0}, "head": [0, 0]}, {"net": 3.0, "head/0": 4.0, "head/1": 12.0}),
        ({"mlp/~/linear": {"w": 0}, "mlp/~/out": {"w": 0}, "x": 0},
         {"mlp/~/linear": 3.0, "mlp/~/out": 4.0, "x": 12.0}),
        ([0, {"w": 0}, (0, 0)], [3.0, 4.0, 12.0]),
        (0, 13.0),
    ],
    ids=["nested", "paths", "names with slashes", "list", "one array"],
)  # fmt: skip
def test_a_group_is_a_prefix_by_the_names_of_parameters(params, bounds):
    rule = GroupClip(bounds)
    assert rule.l2_clip == pytest.approx(13.0)
    weights = rule.weights(jax.tree.map(lambda _: jnp.full(1, 1e4), params))
    leaves = jax.tree.leaves(weights)
    assert len(leaves) == len(jax.tree.leaves(params))
    written = json.loads(plan_of(rule).to_json())["clip"]
    read = dpoptax._serialize.decode(written, dpoptax.clipping.ClipRule)
    assert read == rule
    assert read.weights(jax.tree.map(lambda _: jnp.full(1, 1e4), params)) == weights


def test_parameters_of_a_group_are_clipped_together():
    rule = GroupClip({"net": 1.0, "head": 10.0})
    norms = {"net": {"w": jnp.array([9.0]), "b": jnp.array([16.0])}, "head": jnp.array([4.0])}
    weights = rule.weights(norms)
    np.testing.assert_allclose(weights["net"]["w"], 1 / 5)
    np.testing.assert_allclose(weights["net"]["b"], 1 / 5)
    np.testing.assert_allclose(weights["head"], 1.0)


@attrs.frozen
class OnlyRemoval(EachToTheWholeBound):
    """A rule without a bound for replaced examples."""

    def weights(self, squared_norms, step=0):
        return FlatClip(self.l2_clip).weights(squared_norms)

    def sensitivity(self, relation):
        return self.l2_clip if "add" in str(relation).lower() else math.inf


def test_a_rule_without_a_finite_sensitivity_is_refused_under_that_relation():
    rule = OnlyRemoval(1.0)
    match = "covers a sensitivity of 2 \\* l2_clip.*got inf"
    with pytest.raises(ValueError, match=match):
        plan_of(rule, sampler=dpoptax.samplers.Shuffled(100, 10))
    plan = plan_of(rule)
    assert plan.epsilon() > 0
    with pytest.raises(ValueError, match=match):
        plan.epsilon(relation="replace_one")
    with pytest.raises(ValueError, match=match):
        plan.ledger().epsilon(relation="replace_one")
    assert dpoptax.Report.from_plan(plan, 1).epsilon_replace_one == math.inf
    for built_in in RULES.values():
        for relation in ("add_or_remove_one", "replace_one", "replace_special"):
            check_sensitivity(built_in, relation)


def test_two_parameters_with_one_path_are_refused():
    tree = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    message = r"got two with the path a/b.*Rename"
    with pytest.raises(ValueError, match=message):
        GroupClip({"a/b": 1.0, "a": {"b": 5.0}})
    with pytest.raises(ValueError, match=message):
        GroupClip({"a": 1.0}).weights(tree)
    with pytest.raises(ValueError, match=message):
        PerLayerClip.by_size(1.0, tree)

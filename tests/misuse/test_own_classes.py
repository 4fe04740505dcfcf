"""Classes of the user's own work wherever ours do, and what they leave out is refused by name."""

import dataclasses
import json

import attrs
import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpoptax import Plan, Report, privatize, samplers
from dpoptax.mechanisms import DiscreteGaussian, Gaussian
from dpoptax.samplers import Batch, Sampler
from dpoptax.training import fit


@attrs.frozen
class EveryExample(Sampler):
    """Each step uses all examples."""

    num_examples: int

    @property
    def expected_batch_size(self):
        return self.num_examples  # an int, as people write it

    @property
    def max_batch_size(self):
        return self.num_examples

    def sample(self, state):
        indices = jnp.arange(self.num_examples, dtype=jnp.int32)
        return state.advanced(), Batch(indices, jnp.ones(self.num_examples, bool))

    def event(self, noise_multiplier, num_steps, relation=None):
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(gaussian, num_steps)


@dataclasses.dataclass(frozen=True)
class PowerClip:
    """Clips to a norm, with settings that are a number, a dict and a tuple."""

    l2_clip: float
    power: float = 2.0
    shares: dict[str, float] = dataclasses.field(default_factory=lambda: {"a": 0.5})
    names: tuple[str, ...] = ("a", "b")

    def weights(self, squared_norms, step=0):
        squared = jnp.stack(jax.tree.leaves(squared_norms)).sum(axis=0)
        scale = (1 + (squared / self.l2_clip**2) ** self.power) ** (-0.5 / self.power)
        return jnp.where(jnp.isfinite(squared), scale, 0.0)

    def sensitivity(self, relation):
        return self.l2_clip * (1 if relation == "add_or_remove_one" else 2)


@attrs.frozen
class Doubled:
    """Adds the noise of another mechanism with twice the standard deviation."""

    inner: Gaussian = Gaussian()

    @property
    def caveat(self):
        return "noise is doubled"

    def release(self, key, grads, clip, noise_multiplier, step):
        return self.inner.release(key, grads, clip, 2 * noise_multiplier, step)

    def check(self, clip, noise_multiplier):
        self.inner.check(clip, noise_multiplier)


class Fieldless:
    """A clip rule as a plain class."""

    def __init__(self, l2_clip, table=()):
        self.l2_clip, self.table = l2_clip, np.asarray(table)

    weights, sensitivity = PowerClip.weights, PowerClip.sensitivity
    power = 2.0


OWN = [EveryExample, PowerClip, Doubled]
BUDGET = {"epsilon": 3.0, "delta": 1e-3}
USERS = samplers.UserPoisson([f"user {i % 50}" for i in range(200)], 10, 4)
SAMPLERS = [
    samplers.FixedSize(200, 10),
    samplers.BallsInBins(200, 20),
    samplers.Shuffled(200, 10),
    samplers.CyclicPoisson(200, 10, 2),
    samplers.RandomCyclicPoisson(200, 10, 2),
    samplers.MinSeparated(200, 20, 10),
    samplers.PoissonSchedule([(samplers.Poisson(200, 10), 2), (samplers.Poisson(200, 20), 2)]),
    USERS,
    samplers.UserExamplesPoisson([f"user {i % 50}" for i in range(200)], 10, 4),
    EveryExample(200),
]


def report_of(plan):
    """The report of no steps, which names everything and computes nothing."""
    return str(Report.from_plan(plan, 0))


def test_every_sampler_has_a_test():
    theirs = [value for value in vars(samplers).values() if isinstance(value, type)]
    ours = {cls for cls in theirs if issubclass(cls, Sampler)} - {Sampler, samplers.Poisson}
    assert ours <= {type(sampler) for sampler in SAMPLERS}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_every_sampler_and_clip_rule_is_calibrated(sampler):
    plan = Plan.calibrate(sampler=sampler, clip=PowerClip(1.0), epochs=0.05, **BUDGET)
    assert 2.9 < plan.epsilon() <= 3.0
    assert (plan.sampler, plan.clip) == (sampler, PowerClip(1.0))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_a_plan_of_every_sampler_is_named_written_and_read(sampler):
    plan = Plan(sampler=sampler, clip=PowerClip(1.0), noise_multiplier=1.0, num_steps=9, delta=1e-3)
    text = report_of(plan)
    assert f"{type(sampler).__name__} (" in text
    assert "PowerClip (l2_clip 1, power 2, shares a: 0.5, names [a, b])" in text
    assert "user 7" not in text + plan.to_json() + repr(plan)
    read = Plan.from_json(plan.to_json(), classes=OWN)
    assert read.to_json() == plan.to_json()
    assert read.event() == plan.event()
    assert read == plan or sampler.unit == "user"


def test_a_mechanism_is_named_written_and_read():
    options = {"sampler": EveryExample(200), "clip": 1.0, "num_steps": 1}
    for mechanism in (Doubled(), Doubled(Gaussian(num_draws=4)), DiscreteGaussian(bits=20)):
        plan = Plan.calibrate(mechanism=mechanism, **options, **BUDGET)
        assert Plan.from_json(plan.to_json(), classes=OWN) == plan
        report = Report.from_plan(plan, 0)
        assert type(mechanism).__name__ in json.loads(report.to_json())["mechanism"]["kind"]
        assert f"{type(mechanism).__name__} (" in str(report)


def test_json_names_a_class_and_never_imports_it():
    text = Plan(
        sampler=EveryExample(20), clip=1.0, noise_multiplier=1.0, num_steps=1, delta=1e-3
    ).to_json()
    with pytest.raises(ValueError, match=r"unknown kind of Sampler: .*classes=\[EveryExample\]"):
        Plan.from_json(text)
    with pytest.raises(ValueError, match="unknown kind"):
        Plan.from_json(text, classes=[PowerClip, Doubled])
    attack = text.replace(f"{__name__}:EveryExample", "subprocess:Popen")
    with pytest.raises(ValueError, match="unknown kind of Sampler: 'subprocess:Popen'"):
        Plan.from_json(attack, classes=OWN)
    # A class of the wrong interface is not taken for a sampler, even where it was passed.
    record = json.loads(text)
    record["sampler"] = {"kind": f"{__name__}:PowerClip", "l2_clip": 1.0, "power": 2.0,
                         "shares": {"kind": "dict", "items": []}, "names": []}  # fmt: skip
    with pytest.raises(ValueError, match="expected the record of a Sampler"):
        Plan.from_json(json.dumps(record), classes=OWN)
    with pytest.raises(TypeError, match=r"Fieldless has no record: a class needs fields"):
        Plan.from_json(text, classes=[Fieldless])


def test_what_json_cannot_hold_is_refused_by_name_and_still_reported():
    @attrs.frozen(eq=False)
    class Holds(EveryExample):
        rows: object = None

    class Forgets(PowerClip):
        def __init__(self, l2_clip, power=2.0, shares=(), names=()):
            super().__init__(2 * l2_clip)

    options = {"noise_multiplier": 1.0, "num_steps": 1, "delta": 1e-3}
    secret = np.array([31337.0])
    holds = Plan(sampler=Holds(20, secret), clip=1.0, **options)
    with pytest.raises(TypeError, match=r"got Holds\.rows of type ndarray"):
        holds.to_json()
    plain = Plan(sampler=EveryExample(20), clip=Fieldless(1.0, [31337.0]), **options)
    with pytest.raises(TypeError, match="Fieldless has no record: a class needs fields"):
        plain.to_json()
    with pytest.raises(TypeError, match=r"Forgets has no record: made again from its fields"):
        Plan(sampler=EveryExample(20), clip=Forgets(1.0), **options).to_json()
    for plan, name in ((holds, "Holds (unit example"), (plain, "Fieldless (l2_clip 1)")):
        text = report_of(plan)
        assert name in text
        assert "31337" not in text + plan.ledger().to_json()


def test_a_class_in_place_of_a_value_is_refused():
    options = {"sampler": EveryExample(20), "noise_multiplier": 1.0, "num_steps": 1, "delta": 1e-3}
    with pytest.raises(TypeError, match=r"got the class PowerClip\. Make a value"):
        Plan(clip=PowerClip, **options)
    with pytest.raises(TypeError, match=r"mechanism must be .* such as Gaussian\(\)"):
        Plan(clip=1.0, mechanism=Gaussian, **options)


def test_an_own_clip_rule_must_be_whole_and_honest():
    @attrs.frozen
    class NoSensitivity:
        l2_clip: float
        weights = PowerClip.weights

    class Understated(PowerClip):
        def sensitivity(self, relation):
            return 3 * self.l2_clip

    options = {"sampler": EveryExample(20), "noise_multiplier": 1.0, "num_steps": 1, "delta": 1e-3}
    # The type checker of the tests refuses it first, where it is on.
    with pytest.raises(TypeError, match=r"got NoSensitivity without sensitivity|Type-check error"):
        Plan(clip=NoSensitivity(1.0), **options)
    with pytest.raises(ValueError, match=r"moves the sum by 3\.0"):
        Plan(clip=Understated(1.0), **options)


def rule_of(weigh):
    """A clip rule from a function of the norm and the bound."""

    class Own(PowerClip):
        def weights(self, squared_norms, step=0):
            squared = jnp.stack(jax.tree.leaves(squared_norms)).sum(axis=0)
            return weigh(squared, jnp.float32(self.l2_clip))

    return Own(2.0)


WRONG_RULES = {
    "does not clip": (lambda n2, c: jnp.where(jnp.isfinite(n2), 1.0, 0.0), "at most l2_clip"),
    "forgets the root": (
        lambda n2, c: jnp.where(jnp.isfinite(n2), jnp.minimum(1, n2 / c), 0.0), "at most l2_clip",
    ),
    "keeps NaN": (lambda n2, c: jnp.minimum(1, c / jnp.sqrt(n2)), "weight 0 to a norm that is not"),
    "negative": (lambda n2, c: jnp.where(jnp.isfinite(n2), -c / jnp.sqrt(n2), 0.0), "zero or more"),
    "by the largest of the batch": (
        lambda n2, c: jnp.where(
            jnp.isfinite(n2),
            jnp.minimum(1, c / jnp.sqrt(jnp.max(n2, initial=0, where=jnp.isfinite(n2)))), 0.0,
        ),
        "depend on its own norms only",
    ),
    "one for all": (lambda n2, c: jnp.zeros(()), "one number per example"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_RULES)
def test_an_own_clip_rule_that_breaks_a_law_is_refused(kind):
    weigh, match = WRONG_RULES[kind]
    options = {"noise_multiplier": 1.0, "expected_batch_size": 2, "key": jax.random.key(0)}
    with pytest.raises(ValueError, match=match):
        privatize(rule_of(weigh), **options)
    with pytest.raises(ValueError, match=match):
        jax.jit(lambda key: privatize(rule_of(weigh), **(options | {"key": key})).init(0.0))(
            jax.random.key(1)
        )


def test_an_own_clip_rule_that_keeps_the_laws_is_accepted():
    def smooth(n2, c):
        return jnp.where(jnp.isfinite(n2), 1 / jnp.sqrt(1 + n2 / c**2), 0.0)

    class ByName(PowerClip):
        def weights(self, squared_norms, step=0):
            return smooth(squared_norms["dense"], 1.0)

    options = {"noise_multiplier": 1.0, "expected_batch_size": 2, "key": jax.random.key(0)}
    assert privatize(rule_of(smooth), **options)
    assert privatize(ByName(1.0), **options)  # it cannot be tried without its parameters
    assert privatize(PowerClip(1e-6), **options)
    assert privatize(PowerClip(1e15), **options)


def per_array(weigh):
    """A clip rule from a function of the norms of one array, those of all, and the bound."""

    class OwnGroups(PowerClip):
        def weights(self, squared_norms, step=0):
            whole = sum(jax.tree.leaves(squared_norms))
            bound = jnp.float32(self.l2_clip)
            return jax.tree.map(lambda one: weigh(one, whole, bound), squared_norms)

    return OwnGroups(2.0)


def shared(one, whole, bound):
    return jnp.where(jnp.isfinite(whole), jnp.minimum(1, bound / 2**0.5 / jnp.sqrt(one)), 0.0)


def test_an_own_rule_with_groups_is_checked_for_the_whole_contribution():
    """Its arrays are those of the parameters, so the last check is at `init`."""
    options = {"noise_multiplier": 1.0, "expected_batch_size": 2, "key": jax.random.key(0)}
    two, three = [jnp.zeros(2)] * 2, [jnp.zeros(2)] * 3
    wrong = {
        "each array has the whole bound": (
            lambda one, whole, bound: jnp.where(
                jnp.isfinite(whole), jnp.minimum(1, bound / jnp.sqrt(one)), 0.0
            ),
            "whole gradient of an example to at most l2_clip",
        ),
        "keeps the groups that are finite": (
            lambda one, whole, bound: shared(one, one, bound) / 2,
            "and to all groups of that example",
        ),
        "one for all": (lambda one, whole, bound: jnp.zeros(()), "one number per example"),
    }  # fmt: skip
    for weigh, match in wrong.values():
        with pytest.raises(ValueError, match=match):
            privatize(per_array(weigh), **options)

    class OfTwo(PowerClip):  # it knows its two arrays, so it cannot be tried before
        def weights(self, squared_norms, step=0):
            first, second, *others = squared_norms
            scale = shared(first, first + second, jnp.float32(self.l2_clip))
            return [scale, shared(second, first + second, jnp.float32(self.l2_clip)), *others]

    assert privatize(OfTwo(2.0), **options).init(two)
    with pytest.raises(ValueError, match=r"at most l2_clip|not finite"):
        privatize(OfTwo(2.0), **options).init(three)

    class Renamed(OfTwo):
        def weights(self, squared_norms, step=0):
            return dict(enumerate(super().weights(squared_norms)))

    with pytest.raises(ValueError, match=r"Renamed: weights must be .* a tree prefix"):
        privatize(Renamed(2.0), **options).init(two)


@pytest.mark.slow
def test_a_run_of_own_classes_is_reported_and_resumed(tmp_path):
    plan = Plan(
        sampler=EveryExample(8), clip=PowerClip(1.0), noise_multiplier=1.0, num_steps=2,
        delta=1e-3, mechanism=Doubled(),
    )  # fmt: skip

    def train(plan, resume):
        return fit(
            lambda w, x: (w - x) ** 2, jnp.zeros(()), jnp.ones(8), plan=plan,
            optimizer=optax.sgd(0.1), key=jax.random.key(0), progress=False, resume=resume,
        )  # fmt: skip

    train(plan, tmp_path / "run")
    longer = plan.replace(num_steps=4)
    resumed = train(longer, tmp_path / "run")
    assert resumed.num_steps == 4
    assert float(resumed.params) == float(train(longer, None).params)
    assert "Doubled (inner Gaussian (num_draws 1))" in report_of(longer)
    with pytest.raises(ValueError, match="PowerClip"):
        train(longer.replace(clip=PowerClip(1.0, power=3.0)), tmp_path / "run")
    with pytest.raises(ValueError, match="num_draws"):
        train(longer.replace(mechanism=Doubled(Gaussian(num_draws=2))), tmp_path / "run")

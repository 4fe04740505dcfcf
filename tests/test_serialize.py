"""Records: every registered value survives JSON, and nothing else is written or read."""

import dataclasses
import json
import math

import numpy as np
import pytest

from dpoptax import Plan, _serialize
from dpoptax.clipping import (
    AutoSClip,
    ClipRule,
    FlatClip,
    GroupClip,
    NormalizedClip,
    PerLayerClip,
    PsacClip,
    QuantileClip,
    StatefulClipRule,
)
from dpoptax.mechanisms import DiscreteGaussian, Gaussian, Mechanism
from dpoptax.samplers import (
    BallsInBins,
    CyclicPoisson,
    FixedSize,
    Poisson,
    PoissonSchedule,
    Sampler,
    Shuffled,
    UserPoisson,
)
from dpoptax.schedules import Schedule

SCHEDULE = Schedule((1.1, 0.1 + 0.2, math.inf), (5, 9, 1))
SCHEDULE_OF_RULES = Schedule((1.1, 0.1 + 0.2), (5, 9))
VALUES = [
    (Poisson(100, 7.5), Sampler),
    (Poisson(100, 7, 20), Sampler),
    (FixedSize(100, 7), Sampler),
    (Shuffled(100, 7), Sampler),
    (BallsInBins(100, 7), Sampler),
    (BallsInBins(100, 7, max_batch_size=20), Sampler),
    (CyclicPoisson(100, 7, 3), Sampler),
    (PoissonSchedule([(Poisson(100, 7), 3), (Poisson(100, 9), 4)]), Sampler),
    (FlatClip(2.0), ClipRule),
    (FlatClip(math.inf), ClipRule),
    (FlatClip(SCHEDULE), ClipRule),
    (GroupClip({"b/c": 2.0, "a": {"w": SCHEDULE, "-": 1.0}}), ClipRule),
    (GroupClip(3.0), ClipRule),
    (PerLayerClip(SCHEDULE), ClipRule),
    (PerLayerClip(1.0, {"b": 3, "a/w": 4}), ClipRule),
    (AutoSClip(SCHEDULE_OF_RULES, gamma=0.1), ClipRule),
    (PsacClip(2.0, r=0.5), ClipRule),
    (NormalizedClip(2.0), ClipRule),
    (QuantileClip(2.0, quantile=0.3), StatefulClipRule),
    (QuantileClip(count_noise=9.0), (ClipRule, StatefulClipRule)),
    (Gaussian(num_draws=4), Mechanism),
    (DiscreteGaussian(bits=12), Mechanism),
    (SCHEDULE, Schedule),
]


def plan(**changes):
    fields = {
        "sampler": Poisson(60_000, 128),
        "clip": 2.0,
        "noise_multiplier": 1.5,
        "num_steps": 9360,
        "delta": 1 / 60_000,
    }
    return Plan(**(fields | changes))


@pytest.mark.parametrize(("value", "interface"), VALUES, ids=lambda value: type(value).__name__)
def test_every_value_survives_json(value, interface):
    text = json.dumps(_serialize.encode(value), allow_nan=False)
    assert _serialize.decode(json.loads(text), interface) == value


@pytest.mark.parametrize(("value", "interface"), VALUES, ids=lambda value: type(value).__name__)
def test_a_record_with_a_field_too_few_or_too_many_is_refused(value, interface):
    record = _serialize.encode(value)
    for name in set(record) - {"kind"}:
        fewer = {key: item for key, item in record.items() if key != name}
        with pytest.raises(ValueError, match=rf"missing: \['{name}'\], unknown: \[\]"):
            _serialize.decode(fewer, interface)
    with pytest.raises(ValueError, match=r"missing: \[\], unknown: \['seed'\]"):
        _serialize.decode(record | {"seed": 0}, interface)


def test_a_class_joins_by_one_line():
    @_serialize.register
    @dataclasses.dataclass(frozen=True)
    class Slower:
        schedule: Schedule
        samplers: tuple[Poisson, ...]

    value = Slower(SCHEDULE, (Poisson(10, 2), Poisson(20, 2)))
    try:
        record = json.loads(json.dumps(_serialize.encode(value)))
        assert _serialize.decode(record, Slower) == value
    finally:
        del _serialize._CLASSES["Slower"]


def test_a_subclass_has_a_record_of_its_own_class():
    class Wider(FlatClip):
        pass

    record = _serialize.encode(Wider(math.inf))
    assert record == {"kind": f"{__name__}:{Wider.__qualname__}", "l2_clip": "inf"}
    assert _serialize.decode(record, ClipRule, [Wider]) == Wider(math.inf)
    with pytest.raises(ValueError, match=r"unknown kind of ClipRule: .*classes=\["):
        _serialize.decode(record, ClipRule)
    with pytest.raises(ValueError, match="unknown kind of ClipRule"):
        _serialize.decode(record, ClipRule, [FlatClip])


def test_the_users_of_a_sampler_stay_out_of_its_record():
    users = UserPoisson([f"user {i}" for i in range(600)], 20, 1)
    record = _serialize.encode(users)
    assert record["num_examples"] == 600
    assert "user_ids" not in record
    assert "user 7" not in json.dumps(record)
    read = _serialize.decode(record, Sampler)
    assert _serialize.encode(read) == record
    assert read.event(1.0, 5) == users.event(1.0, 5)
    with pytest.raises(ValueError, match=r"arrange needs the user of every example; .*from JSON"):
        read.arrange(np.zeros(600))


def test_what_has_no_record_is_refused():
    with pytest.raises(TypeError, match="a record holds numbers"):
        _serialize.encode_or_describe(object())


def test_plans_survive_json():
    for made in (
        plan(),
        plan(clip=math.inf, noise_multiplier=0),
        plan(sampler=CyclicPoisson(600, 20, 3)),
        plan(noise_multiplier=Schedule((1.1, 0.1 + 0.2), (5, 9))),
    ):
        assert Plan.from_json(made.to_json()) == made
    users = plan(sampler=UserPoisson(range(600), 20, 1))
    read = Plan.from_json(users.to_json())
    assert read.to_json() == users.to_json()
    assert read.epsilon() == users.epsilon()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: r.pop("delta"), r"missing: \['delta'\]"),
        (lambda r: r.update(seed=0), r"unknown: \['seed'\]"),
        (lambda r: r.update(format="other"), "expected a document of format"),
        (lambda r: r["sampler"].update(kind="Bernoulli"), "unknown kind of Sampler: 'Bernoulli'"),
        (lambda r: r["sampler"].update(shuffle=True), r"unknown: \['shuffle'\]"),
        (lambda r: r["clip"].update(kind="adaptive"), "unknown kind of ClipRule"),
        (lambda r: r.update(sampler="Poisson"), "the record of a Sampler must be a JSON object"),
        (lambda r: r.update(clip=r["sampler"]), "expected the record of a ClipRule; got .*Poisson"),
        (lambda r: r["clip"].pop("l2_clip"), r"FlatClip must have.*missing: \['l2_clip'\]"),
        (lambda r: r.update(delta=2.0), "delta must lie strictly between"),
    ],
)
def test_a_plan_that_was_tampered_with_is_refused(change, match):
    record = json.loads(plan().to_json())
    change(record)
    with pytest.raises(ValueError, match=match):
        Plan.from_json(json.dumps(record))


def test_the_name_of_a_file_in_place_of_its_text_is_refused():
    with pytest.raises(ValueError, match=r"name of a file.*read_text\(\)"):
        Plan.from_json("runs/plan.json")

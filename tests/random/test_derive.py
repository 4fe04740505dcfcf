"""Keys by name, and the fingerprint that noise keys are derived from."""

import dataclasses
import enum
import functools
import math
from typing import NamedTuple

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import DiscreteGaussian, Gaussian
from dpoptax.random import derive_key, insecure_key
from dpoptax.random._derive import fingerprint
from dpoptax.schedules import Schedule


@attrs.frozen
class Rule:
    bound: object


@attrs.frozen
class OtherRule:
    bound: object


@dataclasses.dataclass(frozen=True)
class Record:
    bound: object
    note: str = "x"


class Plain:
    def __init__(self, bound):
        self.bound = bound


class Pair(NamedTuple):
    first: int
    second: int


DIFFERENT = [
    *(0, 1, True, False, None, 0.0, -0.0, 1.0, math.inf, 0.1, np.nextafter(0.1, 1).item()),
    *("", "1", "None", "(1)", '"', "é"),
    *((), [], {}, (1,), [1], (1, 2), (12,), ((1,), 2), (1, (2,)), {"a": 1}, {"a": "1"}, {1: "a"}),
    *(Rule(1), Rule(1.0), Rule("1"), Rule((1,)), Rule(Rule(1)), OtherRule(1), Record(1), Plain(1)),
    Record(1, note="y"),
    *(FlatClip(1.0), FlatClip(2.0), FlatClip(math.inf), FlatClip(Schedule((1.0,), (1,)))),
    *(Gaussian(), Gaussian(num_draws=2), Gaussian(jax_random=True), DiscreteGaussian()),
]


def test_different_values_have_different_fingerprints_and_equal_ones_the_same():
    found = [fingerprint(value) for value in DIFFERENT]
    assert len(set(found)) == len(DIFFERENT)
    assert [fingerprint(value) for value in DIFFERENT] == found
    assert len({fingerprint(1, 2), fingerprint((1, 2)), fingerprint("1;2"), fingerprint(12)}) == 4
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(FlatClip(2)) == fingerprint(FlatClip(np.float32(2)))


def test_the_fingerprint_of_what_is_released_is_pinned():
    """If this text changes, saved states draw other noise: say so in the changelog."""
    assert fingerprint(FlatClip(1.0), 1.5, Gaussian(), [("['w']", (3,), "float32")]) == (
        'dpoptax.clipping.FlatClip("l2_clip"=0x1.0000000000000p+0);'
        "0x1.8000000000000p+0;"
        'dpoptax.mechanisms.Gaussian("num_draws"=1,"jax_random"=False);'
        '[("[\'w\']",(3),"float32")]'
    )


class Colour(enum.Enum):
    RED = 1


OPAQUE = {
    "array": np.ones(2),
    "jax array": jnp.ones(2),
    "numpy number": np.float32(1),
    "function": math.sqrt,
    "lambda": lambda: 1,
    "partial": functools.partial(math.sqrt, 2.0),
    "class": Rule,
    "set": {1},
    "bytes": b"1",
    "complex": 1j,
    "object": object(),
    "named tuple": Pair(1, 2),
    "subclass of a dict": type("Table", (dict,), {})(a=1),
    "enum": Colour.RED,
}


@pytest.mark.parametrize("value", OPAQUE.values(), ids=OPAQUE)
@pytest.mark.parametrize("wrap", [Rule, Record, Plain, lambda value: (value,)])
def test_what_holds_more_than_its_fields_is_refused(wrap, value):
    with pytest.raises(TypeError, match=r"numbers, strings, tuples.*tuple\(array.tolist\(\)\)"):
        fingerprint(wrap(value))


def test_a_traced_value_is_refused():
    with pytest.raises(TypeError, match="numbers, strings"):
        jax.jit(lambda x: fingerprint(Rule(x)))(1.0)


@pytest.mark.parametrize("make", [jax.random.key, insecure_key])
def test_names_and_keys_give_different_keys(make):
    keys = [derive_key(make(seed), name) for seed in range(2) for name in ("", "a", "b")]
    data = {np.asarray(jax.random.key_data(key)).tobytes() for key in keys}
    assert len(data) == 6
    assert all(jax.random.key_impl(key) == jax.random.key_impl(make(0)) for key in keys)
    again = dpoptax.random.derive_key(make(0), "a")
    assert again == keys[1]


@pytest.mark.parametrize("make", [jax.random.key, insecure_key])
def test_the_keys_of_a_run_are_no_keys_that_split_or_fold_in_give(make):
    """Else a key that a caller derives by number could be that of the noise."""

    def data_of(keys):
        return {np.asarray(row).tobytes() for row in jax.random.key_data(keys)}

    root = make(0)
    keys = dpoptax.random.split_by_purpose(root)
    # The key of the model may be of another type, and is then longer or shorter.
    derived = {np.asarray(jax.random.key_data(key)).tobytes() for key in keys}
    assert len(derived) == 3
    for num in (2, 3, 4, 16):
        assert not derived & data_of(jax.random.split(root, num))
    numbers = jnp.arange(100)
    assert not derived & data_of(jax.vmap(jax.random.fold_in, (None, 0))(root, numbers))

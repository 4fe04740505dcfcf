"""What the noise of a transformation depends on, and what it does not."""

import attrs
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpoptax
from dpoptax import _serialize
from dpoptax.clipping import FlatClip
from dpoptax.mechanisms import Gaussian


def noise(clip=1.0, noise_multiplier=1.0, num=64, **options):
    tx = dpoptax.privatize(
        clip, noise_multiplier, expected_batch_size=1.0, key=jax.random.key(0), **options
    )
    params = jnp.zeros(num)
    return np.asarray(tx.update(params[None], tx.init(params), params)[0])


def test_noise_does_not_depend_on_any_record_format(monkeypatch):
    """Neither a field more in a record nor another `repr` changes a release."""
    expected = noise()
    for name, value in vars(_serialize).items():
        if callable(value) and getattr(value, "__module__", "") == _serialize.__name__:
            monkeypatch.setattr(_serialize, name, lambda *args, **kwargs: {"another": "record"})
    monkeypatch.setattr(Gaussian, "__repr__", lambda self: "another repr")
    monkeypatch.setattr(FlatClip, "__repr__", lambda self: "another repr")
    np.testing.assert_array_equal(noise(), expected)


def test_noise_is_the_normal_draws_of_the_derived_key():
    """Spelled out with public functions: a state of version 0.1 must be readable later."""
    text = (
        'dpoptax.clipping.FlatClip("l2_clip"=0x1.0000000000000p+0);0x1.0000000000000p+0;'
        "0x1.0000000000000p+0;0x1.0000000000000p+0;"
        'dpoptax.mechanisms.Gaussian("num_draws"=1,"jax_random"=True);[("",(64),"float32")]'
    )
    key = jax.random.fold_in(jax.random.key(0), 0)
    key = jax.random.fold_in(dpoptax.random.derive_key(key, text), 0)
    expected = jax.random.normal(jax.random.split(key, 2)[0], (64,))
    found = noise(mechanism=Gaussian(jax_random=True))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@attrs.frozen
class HalfClip:
    """Scales every gradient to at most half of `l2_clip`."""

    l2_clip: float
    note: str = ""

    def weights(self, squared_norms, step=0):
        return 0.5 * FlatClip(self.l2_clip).weights(squared_norms, step)

    def sensitivity(self, relation):
        return 0.5 * FlatClip(self.l2_clip).sensitivity(relation)


@attrs.frozen
class NamedGaussian(Gaussian):
    """A mechanism with a field more."""

    name: str = ""


def test_every_field_of_a_rule_or_mechanism_changes_the_noise_and_nothing_else_does():
    found = [
        noise(),
        noise(HalfClip(1.0)),
        noise(HalfClip(1.0, note="x")),
        noise(mechanism=Gaussian(jax_random=True)),
        noise(mechanism=NamedGaussian()),
        noise(mechanism=NamedGaussian(name="x")),
    ]
    correlations = np.corrcoef(found)[np.triu_indices(len(found), 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(64)
    for clip in (FlatClip(1), 1, np.float32(1)):
        np.testing.assert_array_equal(noise(clip), found[0])


class ArrayClip(HalfClip):
    """A rule that holds an array."""


def test_a_rule_with_an_array_is_refused_when_the_transformation_is_made():
    with pytest.raises(TypeError, match=r"tuple\(array.tolist\(\)\)"):
        noise(ArrayClip(1.0, note=np.ones(2)))


def test_arguments_after_the_second_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        dpoptax.privatize(1.0, 1.0, 8.0, key=jax.random.key(0))
    for alias in (dpoptax.dp_sgd, dpoptax.dp_adam):
        with pytest.raises(TypeError, match="positional"):
            alias(0.1, 1.0, 1.0, expected_batch_size=8.0, key=jax.random.key(0))

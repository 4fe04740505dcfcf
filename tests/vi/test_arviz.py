"""Export to ArviZ: the groups of both major versions, and nothing private unless it is passed."""

import importlib.util
import sys
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from dpoptax.vi import to_arviz

POSTERIOR = {"slope": jnp.arange(6.0).reshape(3, 2), "scale": jnp.ones(3)}
PREDICTIVE = {"y": jnp.zeros((3, 5))}
OBSERVED = {"y": jnp.arange(5.0)}


def version_0(posterior=None, *, posterior_predictive=None, prior=None, prior_predictive=None,
              observed_data=None):  # fmt: skip
    groups = dict(locals())
    return {name: value for name, value in groups.items() if value is not None}


def version_1(data, *, name=None, dims=None):
    del name, dims
    return data


@pytest.mark.parametrize("from_dict", [version_0, version_1])
def test_groups_are_passed_as_each_version_takes_them(from_dict, monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(from_dict=from_dict))
    found = to_arviz(POSTERIOR, prior_predictive=PREDICTIVE)
    assert set(found) == {"posterior", "prior_predictive"}
    assert found["posterior"]["slope"].shape == (1, 3, 2)
    assert found["prior_predictive"]["y"].shape == (1, 3, 5)
    with_data = to_arviz(POSTERIOR, nonprivate_observed_data=OBSERVED)
    assert with_data["observed_data"]["y"].shape == (5,)


@pytest.mark.skipif(importlib.util.find_spec("arviz") is None, reason="needs ArviZ")
def test_arviz_summarizes_the_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 0.23 announces version 1
        import arviz

        draws = np.random.default_rng(0).normal(size=(400, 2))
        found = to_arviz(
            {"slope": draws}, posterior_predictive={"y": draws}, prior={"slope": draws}
        )
        summary = arviz.summary(found)
    assert len(summary) == 2
    np.testing.assert_allclose(summary["mean"].astype(float), draws.mean(axis=0), atol=0.01)
    # A property of version 1, and a method of version 0.
    groups = found.groups() if callable(found.groups) else found.groups
    names = {name.strip("/") for name in groups} - {""}
    assert names == {"posterior", "posterior_predictive", "prior"}
    assert dict(found["posterior"].sizes)["draw"] == 400


@pytest.mark.untyped
def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="posterior must be a dictionary"):
        to_arviz(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"prior has different numbers of draws: \[0, 3\]"):
        to_arviz(POSTERIOR, prior={"a": jnp.zeros(3), "b": jnp.zeros(())})
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match=r"pip install 'dpoptax\[arviz\]'"):
        to_arviz(POSTERIOR)

"""The code of docs/variational_inference.md runs, from top to bottom, in one namespace."""

import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import Trace_ELBO

import dpoptax

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "variational_inference.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
N, INPUTS, PIXELS = 200, 30, 8


def setting():
    """Returns what the page leaves to its reader: data, a plan, and an encoder with a decoder."""
    x_key, y_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (N, INPUTS)) / 3
    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(N, 100),
        clip=1.0,
        noise_multiplier=1.0,
        num_steps=5,
        delta=1e-4,
    )

    def encode(params, image):
        return params["encoder"] @ image, jnp.ones(2)

    def log_likelihood(params, latent, image):
        return -jnp.sum((image - latent @ params["decoder"]) ** 2)

    return {
        "dpoptax": dpoptax,
        "jax": jax,
        "jnp": jnp,
        "numpyro": numpyro,
        "dist": dist,
        "optax": optax,
        "Trace_ELBO": Trace_ELBO,
        "plan": plan,
        "key": jax.random.key(1),
        "x": x,
        "y": (jax.random.uniform(y_key, (N,)) < jax.nn.sigmoid(x[:, 0])).astype(jnp.float32),
        "num_examples": N,
        "encode": encode,
        "log_likelihood": log_likelihood,
        "params": {"encoder": jnp.ones((2, PIXELS)), "decoder": jnp.ones((2, PIXELS))},
        "images": jnp.ones((N, PIXELS)),
    }


@pytest.mark.nightly
@pytest.mark.slow
def test_the_code_of_the_page_runs_from_top_to_bottom(monkeypatch):
    fake = types.SimpleNamespace(from_dict=lambda data: data)
    monkeypatch.setitem(sys.modules, "arviz", fake)  # it may not be installed
    names = setting()
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        for block in BLOCKS:
            exec(compile(block, str(PAGE), "exec"), names)
    assert names["predicted"]["y"].shape == (1000, 5)
    assert 0 < names["check"].overall_p_value <= 1
    assert names["more"].report().epsilon > names["more"].fit.plan.epsilon()
    assert set(names["exported"]) == {
        *("posterior", "posterior_predictive", "prior", "prior_predictive")
    }

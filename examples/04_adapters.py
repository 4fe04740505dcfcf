"""A transformer with a public, frozen backbone: only low-rank adapters are trained privately.

A text classifier is trained on public texts without privacy. Then it is adapted to private texts:
a low-rank product A B is added to each weight W (Hu et al. 2021, arXiv:2106.09685). Only A, B and
the head have gradients, so only they need memory and noise. The loop uses Optax and Flax's
`TrainState`. Comments mark the lines that make it private.

    python examples/04_adapters.py
    python examples/04_adapters.py --help

The texts are generated: each topic uses some words more often, and the private topics are mixtures
of the public ones. The program prints the accuracy on new private texts before and after the
adaptation, and its epsilon.
"""

import argparse
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import dpoptax

WORDS, LENGTH, WIDTH, HEADS, LAYERS, RANK = 300, 24, 48, 4, 2, 4
PUBLIC_TOPICS, PRIVATE_TOPICS = 8, 4


# 1. Model: a transformer of Flax layers, and adapters for its weights


class Classifier(nn.Module):
    """A transformer that classifies one text, given as token ids."""

    topics: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Returns `(topics,)` logits for `(LENGTH,)` ids."""
        positions = self.param("positions", nn.initializers.normal(0.02), (LENGTH, WIDTH))
        x = nn.Embed(WORDS, WIDTH, name="words")(ids) + positions
        for layer in range(LAYERS):
            attention = nn.MultiHeadDotProductAttention(HEADS, name=f"attention{layer}")
            x = x + attention(nn.LayerNorm(name=f"before{layer}")(x))
            wide = nn.Dense(2 * WIDTH, name=f"wide{layer}")
            narrow = nn.Dense(WIDTH, name=f"narrow{layer}")
            x = x + narrow(nn.gelu(wide(nn.LayerNorm(name=f"between{layer}")(x))))
        return nn.Dense(self.topics, name="head")(nn.LayerNorm(name="last")(x).mean(axis=0))


def new_adapters(backbone: Any, key: jax.Array) -> Any:
    """Returns A (normal) and B (zero) for each kernel of the backbone."""
    adapters = {}
    for path, kernel in jax.tree_util.tree_leaves_with_path(backbone):
        if "kernel" in jax.tree_util.keystr(path):
            key, own = jax.random.split(key)
            rows = kernel.shape[0]
            a = jax.random.normal(own, (rows, RANK)) / np.sqrt(rows)
            adapters[jax.tree_util.keystr(path)] = (a, jnp.zeros((RANK, kernel.size // rows)))
    return adapters


def adapted(backbone: Any, adapters: Any) -> Any:
    """Returns the backbone with A B added to its kernels."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        pair = adapters.get(jax.tree_util.keystr(path))
        return leaf if pair is None else leaf + (pair[0] @ pair[1]).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, backbone)


# 2. Data: texts of a topic use some words more often


def texts(rng: np.random.Generator, tilts: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids `(count, LENGTH)` and topics `(count,)`."""
    topics = rng.integers(len(tilts), size=count)
    chances = np.exp(tilts) / np.exp(tilts).sum(axis=1, keepdims=True)
    ids = np.stack([rng.choice(WORDS, LENGTH, p=chances[topic]) for topic in topics])
    return ids.astype(np.int32), topics.astype(np.int32)


# 3. Public training: an ordinary loop without privacy


def cross_entropy(model: Classifier, params: Any, example: tuple[jax.Array, jax.Array]) -> Any:
    logits = model.apply({"params": params}, example[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, example[1])


def train_backbone(model: Classifier, data: Any, steps: int) -> Any:
    """Returns the parameters after `steps` of Adam."""
    tx = optax.adam(2e-3)
    params = model.init(jax.random.key(0), data[0][0])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    @jax.jit
    def step(state: TrainState, batch: Any) -> TrainState:
        def mean_loss(params: Any) -> jax.Array:
            return jax.vmap(lambda row: cross_entropy(model, params, row))(batch).mean()

        return state.apply_gradients(grads=jax.grad(mean_loss)(state.params))

    rng = np.random.default_rng(1)
    for _ in range(steps):
        rows = rng.integers(len(data[0]), size=64)
        state = step(state, jax.tree.map(lambda leaf, rows=rows: leaf[rows], data))
    return state.params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epsilon", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, help="repeats a run; must be secret for the guarantee")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    public_tilts = rng.normal(size=(PUBLIC_TOPICS, WORDS))
    private_tilts = rng.normal(size=(PRIVATE_TOPICS, PUBLIC_TOPICS)) @ public_tilts / 2
    public, private, new = (
        texts(rng, tilts, count)
        for tilts, count in ((public_tilts, 3000), (private_tilts, 3000), (private_tilts, 1000))
    )
    print("Training the backbone on public texts", flush=True)
    backbone = train_backbone(Classifier(PUBLIC_TOPICS), public, 200)

    # Frozen: constants of the loss, without gradients.
    model = Classifier(PRIVATE_TOPICS)
    backbone = {name: layer for name, layer in backbone.items() if name != "head"}
    head = {"kernel": jnp.zeros((WIDTH, PRIVATE_TOPICS)), "bias": jnp.zeros(PRIVATE_TOPICS)}
    params = {"adapters": new_adapters(backbone, jax.random.key(2)), "head": head}

    def whole(params: Any) -> Any:
        return adapted(backbone, params["adapters"]) | {"head": params["head"]}

    def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
        return cross_entropy(model, whole(params), example)

    def accuracy(params: Any) -> float:
        logits = jax.vmap(lambda ids: model.apply({"params": whole(params)}, ids))(new[0])
        return 100 * float(np.mean(np.argmax(logits, axis=1) == new[1]))

    plan = dpoptax.Plan.calibrate(  # private: the sampler and the noise
        num_examples=len(private[0]),
        expected_batch_size=128,
        num_steps=options.steps,
        epsilon=options.epsilon,
        delta=1e-5,
        clip=1.0,
    )
    root = dpoptax.random.secure_key()
    if options.seed is not None:
        root = dpoptax.random.insecure_key(options.seed)
    keys = dpoptax.random.split_by_purpose(root)
    tx = optax.chain(plan.privatize(keys.noise_key), optax.adam(5e-3))  # private: clip and noise
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    sampler_state = plan.sampler.init(keys.sampling_key)
    ledger = plan.ledger()

    @jax.jit
    def step(state: TrainState, sampler_state: Any) -> tuple[TrainState, Any]:
        sampler_state, drawn = plan.sampler.sample(sampler_state)  # private: a Poisson batch
        batch = dpoptax.samplers.take(private, drawn)
        grads = dpoptax.per_example_grads(loss_fn)(state.params, batch)
        return state.apply_gradients(grads=grads), sampler_state

    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (backbone, params)]
    print(f"Adapting {sizes[1]:,} parameters; {sizes[0]:,} stay frozen", flush=True)
    for _ in range(plan.num_steps):
        ledger.charge(plan.noise_multiplier)
        state, sampler_state = step(state, sampler_state)

    print(f"\nAccuracy on new private texts, in percent ({PRIVATE_TOPICS} topics)")
    print(f"  before  {accuracy(params):6.2f}")
    print(f"  after   {accuracy(state.params):6.2f}")
    epsilon = dpoptax.reports.round_up(ledger.epsilon())
    print(f"epsilon {epsilon} at delta {plan.delta:g}, {plan.num_steps} steps")


if __name__ == "__main__":
    main()

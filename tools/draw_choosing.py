"""Draws the figures of docs/choosing.md: `python tools/draw_choosing.py docs/images`.

The last figure trains on scikit-learn's digits, which takes some minutes on two cores.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import dpoptax
from dpoptax.accounting import calibrate_noise_multiplier, epsilon
from dpoptax.samplers import Poisson

NUM_EXAMPLES, DELTA = 60_000, 1e-5
COLOURS = ("#30638e", "#d1495b", "#edae49", "#00798c")
CLIPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SEEDS = 3


def main(folder: pathlib.Path) -> None:
    """Draws all figures into a folder."""
    draw_epsilon(folder / "choosing_epsilon.png")
    draw_batch_size(folder / "choosing_batch_size.png")
    draw_clip(folder / "choosing_clip.png")


def draw_epsilon(path: pathlib.Path) -> None:
    """Epsilon over the noise multiplier, for several batch sizes and 30 epochs."""
    figure, axis = _figure()
    noises = np.geomspace(0.5, 10, 14)
    for colour, size in zip(COLOURS, (256, 1024, 4096, 16384), strict=True):
        costs = [
            epsilon(
                sampler=Poisson(NUM_EXAMPLES, size), noise_multiplier=noise, epochs=30, delta=DELTA
            )
            for noise in noises
        ]
        axis.plot(noises, costs, color=colour, label=f"batches of {size:,}")
    axis.set(xscale="log", yscale="log", xlabel="noise multiplier", ylabel="epsilon")
    axis.set_title(f"30 epochs of 60,000 examples, delta {DELTA:g}", loc="left")
    _save(figure, axis, path)


def draw_batch_size(path: pathlib.Path) -> None:
    """Noise of the mean gradient over the run, over the batch size, at fixed epsilon and epochs."""
    figure, axis = _figure()
    sizes = np.unique(np.geomspace(32, NUM_EXAMPLES / 4, 14).round().astype(int))
    for colour, target in zip(COLOURS, (1.0, 3.0, 8.0), strict=False):
        full = _noise_of_run(NUM_EXAMPLES, 1, target)
        relative = [_noise_of_run(size, NUM_EXAMPLES * 30 // size, target) / full for size in sizes]
        axis.plot(sizes, relative, color=colour, label=f"epsilon {target:g}")
        suggestion = dpoptax.suggest(
            num_examples=NUM_EXAMPLES, epsilon=target, delta=DELTA, num_parameters=26_000
        )
        size = suggestion.expected_batch_size
        axis.plot(size, _noise_of_run(size, suggestion.num_steps, target) / full, "o", color=colour)
    axis.set(xscale="log", yscale="log", xlabel="batch size")
    axis.set_ylabel("noise of the run, relative to full batches")
    axis.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axis.yaxis.minorticks_off()
    axis.set_title(
        f"30 epochs of 60,000 examples, delta {DELTA:g}; dots: dpoptax.suggest", loc="left"
    )
    _save(figure, axis, path)


def draw_clip(path: pathlib.Path) -> None:
    """Accuracy on digits over the clip bound, for flat and automatic clipping."""
    figure, axis = _figure()
    for colour, target in zip(COLOURS, (1.0, 8.0), strict=False):
        flat, automatic = _accuracies(target)
        axis.plot(CLIPS, flat.mean(1), "o-", color=colour, label=f"flat, epsilon {target:g}")
        axis.fill_between(CLIPS, flat.min(1), flat.max(1), color=colour, alpha=0.2)
        axis.axhline(
            automatic.mean(), color=colour, linestyle="--", label=f"automatic, epsilon {target:g}"
        )
        print(f"epsilon {target:g}: flat {flat.mean(1).round(3)}, automatic {automatic.mean():.3f}")
    axis.set(xscale="log", xlabel="clip bound", ylabel="test accuracy")
    axis.set_title(f"digits, a network of 2,410 parameters, {SEEDS} seeds", loc="left")
    _save(figure, axis, path)


def _noise_of_run(size: int, steps: int, target: float) -> float:
    found = calibrate_noise_multiplier(
        epsilon=target, delta=DELTA, sampler=Poisson(NUM_EXAMPLES, size), num_steps=steps
    )
    return found.noise_multiplier / (size * steps**0.5)


def _accuracies(target: float) -> tuple[np.ndarray, np.ndarray]:
    """Test accuracies of each bound and seed, and of AUTO-S, at suggested settings."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order].astype(np.float32) / 16 - 0.3, labels[order].astype(np.int32)
    train = jnp.asarray(images[:1437]), jnp.asarray(labels[:1437])
    suggestion = dpoptax.suggest(
        num_examples=1437, epsilon=target, delta=1e-4, num_parameters=2410, epochs=30
    )
    plan, optimizer = suggestion.plan(), optax.adam(suggestion.learning_rate)

    def accuracy(bound: jax.Array, offset: jax.Array, key: jax.Array) -> jax.Array:
        """Weights of min(1, bound / norm), or of bound / (norm + 0.01) with the offset."""
        init_key, sampling_key, noise_key = jax.random.split(key, 3)
        params = _init(init_key)

        def step(carry: tuple, number: jax.Array) -> tuple:
            params, opt_state, sampler_state = carry
            sampler_state, batch = plan.sampler.sample(sampler_state)
            examples = jax.tree.map(lambda rows: rows.at[batch.indices].get(mode="clip"), train)
            grads = jax.vmap(jax.grad(_loss), (None, 0))(params, examples)
            norms = jax.vmap(optax.global_norm)(grads)
            weights = jnp.where(offset > 0, bound / (norms + offset), jnp.minimum(1, bound / norms))
            weights = jnp.where(batch.mask, weights, 0.0)
            summed = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), grads)
            noise = optax.tree.random_like(jax.random.fold_in(noise_key, number), summed)
            update = jax.tree.map(
                lambda leaf, draw: leaf + plan.noise_multiplier * bound * draw, summed, noise
            )
            update, opt_state = optimizer.update(update, opt_state)
            return (optax.apply_updates(params, update), opt_state, sampler_state), None

        carry = params, optimizer.init(params), plan.sampler.init(sampling_key)
        (params, _, _), _ = jax.lax.scan(step, carry, jnp.arange(plan.num_steps))
        predicted = jnp.argmax(_logits(params, jnp.asarray(images[1437:])), axis=1)
        return jnp.mean(predicted == labels[1437:])

    seeds = jax.random.split(jax.random.key(0), SEEDS)
    bounds = jnp.array([*CLIPS, 1.0])
    offsets = jnp.array([0.0] * len(CLIPS) + [0.01])
    by_seed = jax.vmap(accuracy, (None, None, 0))
    found = np.asarray(jax.jit(jax.vmap(by_seed, (0, 0, None)))(bounds, offsets, seeds))
    return found[:-1], found[-1]


def _init(key: jax.Array) -> dict[str, jax.Array]:
    first, last = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(last, (32, 10)) / 32**0.5,
        "b2": jnp.zeros(10),
    }


def _logits(params: dict[str, jax.Array], image: jax.Array | np.ndarray) -> jax.Array:
    hidden = jnp.tanh(image @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def _loss(params: dict[str, jax.Array], example: tuple[jax.Array, jax.Array]) -> jax.Array:
    image, label = example
    return optax.softmax_cross_entropy_with_integer_labels(_logits(params, image), label)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), dpi=120)
    return figure, figure.subplots()


def _save(figure: Figure, axis: Axes, path: pathlib.Path) -> None:
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

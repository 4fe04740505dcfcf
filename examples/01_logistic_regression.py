"""Logistic regression, trained with differential privacy and without.

The shortest complete run: a Flax model, the loss of one example, a plan within a budget, and
`dpoptax.training.fit`. The gradient of each example is clipped, noise is added to their sum, and
Adam updates the parameters.

    python examples/01_logistic_regression.py
    python examples/01_logistic_regression.py --dataset adult --data-dir DIR    # UCI Adult
    python examples/01_logistic_regression.py --help

It prints the test accuracy of the private model, of a model trained without privacy for the same
number of steps, and of an untrained one. Then it prints the privacy statement, and draws the
largest coefficients of both models. What many examples have in common survives the noise; what
only a few of them show does not. It needs matplotlib and scikit-learn:
pip install 'dpoptax[examples]'.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import Any

import example_data
import example_options
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import dpoptax

DESCRIPTION = (
    "Trains a logistic regression with differential privacy and without, and draws the largest "
    "coefficients of both. Breast cancer takes about ten seconds, Adult about a minute."
)

DEFAULTS = {
    "breast-cancer": example_options.Defaults(
        epochs=30, batch_size=128, epsilon=2.0, delta=1e-4, l2_clip=1.0, learning_rate=0.1
    ),
    "adult": example_options.Defaults(
        epochs=10, batch_size=512, epsilon=1.0, delta=1e-6, l2_clip=1.0, learning_rate=0.03
    ),
}


# 1. Data: rows of numbers, and a label of 0 or 1


def load_rows(options: argparse.Namespace) -> example_data.Data:
    if options.dataset == "breast-cancer":
        return example_data.breast_cancer()
    if options.data_dir is None:
        raise ValueError("--dataset adult needs --data-dir, the folder with adult.data")
    return example_data.adult(options.data_dir)


# 2. Model: one weight per column and a bias


class LogisticRegression(nn.Module):
    """An ordinary Flax model."""

    @nn.compact
    def __call__(self, row: jax.Array) -> jax.Array:
        """Returns the logit of label 1."""
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(row)[..., 0]


MODEL = LogisticRegression()


# 3. Loss: the loss of one example, without a batch axis


def loss_fn(params: Any, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    row, label = example
    logit = MODEL.apply({"params": params}, row)
    return optax.sigmoid_binary_cross_entropy(logit, label.astype(jnp.float32))


# 4. Plan: the sampler, the clip, the noise, the number of steps and delta


def private_plan(options: argparse.Namespace, num_examples: int) -> dpoptax.Plan:
    """Returns the plan with the least noise within the budget."""
    return dpoptax.Plan.calibrate(
        num_examples=num_examples,
        expected_batch_size=options.batch_size,
        epochs=options.epochs,
        num_steps=options.steps,
        epsilon=options.epsilon,
        delta=options.delta,
        clip=options.l2_clip,
    )


def without_privacy(plan: dpoptax.Plan) -> dpoptax.Plan:
    """Returns the same plan without clipping and noise."""
    return plan.replace(clip=math.inf, noise_multiplier=0.0)


# 5. Fit: `main` below calls `dpoptax.training.fit` with both plans

# 6. Evaluate


def accuracy(params: Any, data: example_data.Data) -> float:
    """Returns the percentage of test rows that the model classifies correctly."""
    guesses = MODEL.apply({"params": params}, data.test_inputs) > 0
    return 100 * float(np.mean(np.asarray(guesses) == (data.test_labels == 1)))


# 7. Draw


def draw(path: Path, title: str, columns: tuple[str, ...], private: Any, nonprivate: Any) -> None:
    """Writes a figure of the largest coefficients of both models."""
    private_weights, weights = (
        np.asarray(params["Dense_0"]["kernel"])[:, 0] for params in (private, nonprivate)
    )
    largest = np.argsort(np.abs(weights))[-20:]
    shown = largest[np.argsort(weights[largest])]
    rows = np.arange(len(shown))
    figure = Figure(figsize=(8, 5), dpi=150)
    axis = figure.subplots()
    axis.barh(rows, weights[shown], color="0.82", label="not private")
    axis.plot(private_weights[shown], rows, "o", color="tab:blue", label="private")
    axis.axvline(0, color="0.4", linewidth=0.8)
    axis.set(title=title, xlabel="coefficient: effect of the column on the log-odds of label 1")
    axis.set_yticks(rows, [columns[row] for row in shown], fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.legend(frameon=False, loc="lower right")
    axis.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")


def main() -> None:
    parser = example_options.training_parser(DESCRIPTION, DEFAULTS)
    parser.add_argument("--data-dir", type=Path, help="folder with adult.data and adult.test")
    options = example_options.parse(parser, DEFAULTS)
    with example_options.one_line_errors():
        options.out.mkdir(parents=True, exist_ok=True)
        data = load_rows(options)
        plan = private_plan(options, len(data.train_inputs))

    private_key, (init_key, nonprivate_key) = example_options.keys(options.seed, 2)
    initial = MODEL.init(init_key, data.train_inputs[0])["params"]
    fit = functools.partial(
        dpoptax.training.fit,
        loss_fn,
        initial,
        (data.train_inputs, data.train_labels),
        optimizer=optax.adam(options.learning_rate),
        progress=not options.quiet,
    )

    print(f"Training privately: {plan.num_steps} steps", flush=True)
    private = fit(plan=plan, key=private_key)
    print("Training without privacy, for comparison", flush=True)
    nonprivate = fit(plan=without_privacy(plan), key=nonprivate_key)

    print(f"\nTest accuracy on {len(data.test_labels)} rows, in percent")
    print(f"  private      {accuracy(private.params, data):8.2f}")
    print(f"  not private  {accuracy(nonprivate.params, data):8.2f}")
    print(f"  untrained    {accuracy(initial, data):8.2f}\n")
    print(private.report())
    print("It covers the private model only, not the model without privacy, and not the test rows.")
    print(example_options.key_statement(options.seed))

    path = options.out / f"logistic_regression_{options.dataset}.png"
    epsilon = dpoptax.reports.round_up(private.epsilon())
    title = f"{options.dataset}: private with ε = {epsilon} at δ = {plan.delta:g}"
    draw(path, title, data.columns, private.params, nonprivate.params)
    print(f"\nThe figure is in {path}")


if __name__ == "__main__":
    main()

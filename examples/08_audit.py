"""An audit of a private run: what does an attack on this run really reach?

The guarantee is an upper bound. An audit gives a lower bound on the epsilon of the same run. It
adds canaries to the data: additional examples, each of them in or out by a fair coin. After the
run, an attack guesses which canaries were in. A run that keeps its guarantee limits how often these
guesses are right.

    python examples/08_audit.py                    # a VAE of scikit-learn's digits, about a minute
    python examples/08_audit.py --dataset mnist    # that of MNIST, some minutes
    python examples/08_audit.py --attack loss      # canaries are images; only losses are seen

It prints what the attack reached beside the guarantee, and draws the attack's curve. It needs
matplotlib and scikit-learn: pip install 'dpoptax[examples]'.
"""

import argparse

import example_data
import example_options
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dpoptax
from dpoptax.audit import GradientCanaries, InputCanaries, uniform_inputs
from dpoptax.vi.models import DenseVAE, bernoulli_vae_loss

DESCRIPTION = (
    "Trains a VAE with differential privacy and audits the run: it prints a lower bound on epsilon "
    "beside the guarantee."
)

# Large batches: an attack does not know who is in a batch, and the fewer are, the less it sees.
DEFAULTS = {
    "digits": example_options.Defaults(
        epochs=100, batch_size=600, epsilon=4.0, delta=1e-4, l2_clip=3.0, learning_rate=7e-3
    ),
    "mnist": example_options.Defaults(
        epochs=5, batch_size=512, epsilon=4.0, delta=1e-5, l2_clip=10.0, learning_rate=1e-3
    ),
}
MODELS = {
    "digits": DenseVAE(64, 40, 5, nn.initializers.lecun_normal(), nn.initializers.zeros),
    "mnist": DenseVAE(784, 400, 50),
}


def canaries_of(options: argparse.Namespace, pixels: int, key: jax.Array):
    """Returns the canaries: gradients for the attack on gradients, images for that on losses."""
    if options.attack == "gradients":
        return GradientCanaries(options.canaries)
    # No digit looks like independent pixels, so the model must remember them to explain them.
    images = uniform_inputs(options.canaries, (pixels,), key)
    return InputCanaries(jnp.round(images))


def main() -> None:
    parser = example_options.training_parser(DESCRIPTION, DEFAULTS)
    parser.add_argument("--canaries", type=int, default=1000, metavar="NUMBER", help="[1000]")
    parser.add_argument(
        "--attack",
        choices=("gradients", "loss"),
        default="gradients",
        help="what it sees: the released gradients, or the loss before and after [gradients]",
    )
    options = example_options.parse(parser, DEFAULTS)
    data = {"digits": example_data.digits, "mnist": example_data.mnist}[options.dataset]()
    images = data.train_inputs.reshape(len(data.train_inputs), -1)
    private_key, (init_key, canary_key) = example_options.keys(options.seed, 2)

    with example_options.one_line_errors():
        options.out.mkdir(parents=True, exist_ok=True)
        canaries = canaries_of(options, images.shape[1], canary_key)
        # The guarantee is for the images and the canaries together.
        plan = dpoptax.Plan.calibrate(
            num_examples=len(images) + canaries.num_canaries,
            expected_batch_size=options.batch_size,
            epochs=options.epochs,
            num_steps=options.steps,
            epsilon=options.epsilon,
            delta=options.delta,
            clip=options.l2_clip,
        )

    model = MODELS[options.dataset]
    result = dpoptax.training.fit(
        bernoulli_vae_loss(model),
        model.init(init_key, jnp.zeros(model.pixels))["params"],
        images,
        plan=plan,
        optimizer=optax.adam(options.learning_rate),
        key=private_key,
        audit=canaries,
        progress=not options.quiet,
    )
    print(result.report())
    path = options.out / f"audit_{options.dataset}.png"
    result.audit.save_figure(path)
    print(f"\nThe figure is in {path}")


if __name__ == "__main__":
    main()

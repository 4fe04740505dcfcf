"""Suggested settings of a private run: batch size, steps, learning rate and clip, with reasons."""

import math
import textwrap

import attrs
import dp_accounting

from dpoptax import _validate, clipping
from dpoptax._foreign_names import answer_foreign_names
from dpoptax._plan import Plan
from dpoptax.accounting._budget import Budget
from dpoptax.accounting._smallest_batch import calibrate_with_smallest_batch
from dpoptax.clipping import ClipRule
from dpoptax.mechanisms import Gaussian
from dpoptax.mechanisms._state import AnyMechanism
from dpoptax.samplers import Poisson

# The compute without a statement: 30 epochs, and for small data as many as make 300,000 gradients,
# which lets the noise reach its floor and still takes seconds.
EPOCHS, FEWEST_GRADIENTS = 30.0, 300_000
# Below, there are too few steps of any size to learn from.
SMALLEST_COMPUTE = 1000
# Accuracy hardly changed between 100 and 1000 steps at a fixed number of epochs (docs/choosing.md).
FEWEST_STEPS, MOST_STEPS = 200, 2000
# Smaller batches leave a processor idle.
SMALLEST_BATCH = 32
# How far the noise of the run may exceed that of full batches, to have more steps.
EXCESS_NOISE = 1.1
# How far a parameter may walk: WALK * num_parameters ** -0.25, and at most LONGEST_WALK. Measured
# for models of 62 to 19,000 parameters (docs/choosing.md).
WALK, LONGEST_WALK = 3.0, 0.7
L2_CLIP = 0.1
WIDTH = 94


@attrs.frozen(kw_only=True)
class Suggestion:
    """Settings of a private run. Print it to read them with the reasons.

    Attributes:
        num_examples: how many examples there are.
        epsilon: the budget.
        delta: of the budget.
        num_parameters: how many parameters are trained.
        expected_batch_size: the mean number of examples in a Poisson batch.
        num_steps: how many steps to plan.
        learning_rate: for `optax.adam`.
        l2_clip: the bound of the clip rule. Adam does not depend on it.
        reasons: why, in sentences with sources.

    Example:
        >>> import dpoptax
        >>> suggestion = dpoptax.suggest(
        ...     num_examples=1437, epsilon=3.0, delta=1e-4, num_parameters=2410
        ... )
        >>> suggestion.expected_batch_size, suggestion.num_steps, suggestion.learning_rate
        (150, 2000, 0.0096)
        >>> plan = suggestion.plan()
        >>> plan.epsilon() <= 3.0
        True
    """

    num_examples: int
    epsilon: float
    delta: float
    num_parameters: int
    expected_batch_size: int
    num_steps: int
    learning_rate: float
    l2_clip: float
    reasons: tuple[str, ...]

    def plan(
        self,
        *,
        clip: ClipRule | float | None = None,
        mechanism: AnyMechanism = Gaussian(),
        earlier: dp_accounting.DpEvent | None = None,
    ) -> Plan:
        """Returns the plan with these settings and the least noise that keeps the budget.

        Args:
            clip: a clip rule or a bound; None for `clipping.PsacClip(l2_clip)`.
            mechanism: how the noise is drawn.
            earlier: the event of other releases on the same data, such as a private quantile of the
                norms. The budget pays for them too: charge them to the ledger of the run.
        """
        # The smaller batches of a plan cost a little, which the budget must pay for too.
        sampler, found = calibrate_with_smallest_batch(
            Poisson(self.num_examples, self.expected_batch_size),
            self.num_steps,
            self.epsilon,
            self.delta,
            earlier,
        )
        return Plan(
            sampler=sampler,
            clip=clipping.PsacClip(self.l2_clip) if clip is None else clip,
            noise_multiplier=found.noise_multiplier,
            num_steps=self.num_steps,
            delta=self.delta,
            mechanism=mechanism,
        )

    def __str__(self) -> str:
        rows = {
            "Batch size": f"{self.expected_batch_size:,} examples on average, Poisson sampling",
            "Steps": f"{self.num_steps:,}",
            "Optimizer": f"optax.adam({self.learning_rate:g})",
            "Clipping": f"automatic (PSAC), with l2_clip {self.l2_clip:g}",
        }
        head = (
            f"Suggested for {self.num_examples:,} examples, {self.num_parameters:,} parameters, "
            f"epsilon {self.epsilon:g} and delta {self.delta:.2g}"
        )
        lines = [head, "", *(f"  {name:<10}  {text}" for name, text in rows.items()), "", "Why", ""]
        for reason in self.reasons:
            lines += textwrap.wrap(reason, WIDTH, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)


@answer_foreign_names
def suggest(
    *,
    num_examples: int,
    epsilon: float,
    delta: float,
    num_parameters: int,
    epochs: float | None = None,
    num_gradients: int | None = None,
) -> Suggestion:
    """Suggests batch size, steps, learning rate and clip for a private run.

    It reads public numbers only, so the suggestion costs no privacy. The rules are:

    - **Steps and batch size.** Under the central limit theorem (Bu et al. 2020, arXiv:1911.11607),
      the noise of the mean gradient over a whole run depends on the budget and on num_examples, as
      long as the noise multiplier is about 2 or more; with less, it grows (Sander et al. 2022,
      arXiv:2210.03403). We take as many steps as the compute allows with at most 10 % more noise
      than full batches have, from 200 to 2000.
    - **Clip.** PSAC (Xia et al. 2023, arXiv:2212.00328) with its published constant 0.1: nothing to
      tune. Gradients are scaled to one norm (Bu et al. 2023, arXiv:2206.07136), except those of
      examples that are fitted already, which stay short.
    - **Learning rate**, of Adam. The noise moves each parameter like a random walk, by about
      `learning_rate * sqrt(num_steps)`. We let it be 3 * num_parameters ** -0.25, and 0.7 at most.
      The features of an example should have a norm of about 3 or more.

    Args:
        num_examples: how many examples there are.
        epsilon: the budget.
        delta: strictly between 0 and 1, and well below 1 / num_examples.
        num_parameters: how many parameters are trained.
        epochs: the compute, as how often each example takes part on average; by default 30, and
            more if this makes fewer than 300,000 gradients; or
        num_gradients: the compute, as how many gradients of one example the run may take.

    Returns:
        A `Suggestion`.

    Raises:
        TypeError: an argument has the wrong type; or both epochs and num_gradients are given.
        ValueError: a number is out of range, or the compute is too small for any run.

    Warns:
        UserWarning: delta is above 1 / num_examples.

    Example:
        >>> import dpoptax
        >>> suggestion = dpoptax.suggest(
        ...     num_examples=60_000, epsilon=3.0, delta=1e-5, num_parameters=26_000, epochs=20
        ... )
        >>> print(str(suggestion).splitlines()[0])
        Suggested for 60,000 examples, 26,000 parameters, epsilon 3 and delta 1e-05

    Reference: Ponomareva et al. 2023, arXiv:2303.00654, section 5; De et al. 2022,
    arXiv:2204.13650; Li et al. 2022, arXiv:2110.05679; Tramer and Boneh 2021, arXiv:2011.11660.
    """
    num_examples = _validate.num_examples(num_examples)
    epsilon = _validate.positive("epsilon", epsilon)
    budget = Budget(epsilon, delta, None)
    num_parameters = _validate.count("num_parameters", num_parameters)
    _validate.warn_of_large_delta(budget.delta, num_examples, Poisson(num_examples, 1).unit)
    gradients = _compute(num_examples, epochs, num_gradients)
    mu = budget.gaussian_mu()
    steps, batch_size, excess = _steps_and_batch_size(num_examples, gradients, mu)
    walk = min(WALK * num_parameters**-0.25, LONGEST_WALK)
    # Two digits: the rule is no more accurate than that.
    learning_rate = float(f"{walk / math.sqrt(steps):.2g}")
    reasons = (
        f"Each example takes part {batch_size * steps / num_examples:.3g} times on average, in "
        f"{steps:,} steps of {batch_size:,} examples. Over the whole run, the noise of the mean "
        f"gradient is about {100 * (excess - 1):.0f} % above that of full batches, which is the "
        "least for this budget (Sander et al. 2022). Larger batches would leave fewer steps for "
        "the same compute (De et al. 2022; Ponomareva et al. 2023, section 5.4).",
        _about_compute(gradients, (epochs, num_gradients) != (None, None), steps, batch_size),
        f"The learning rate is for Adam. Noise moves a parameter by about {walk:.2g} during the "
        "run, which is 3 / num_parameters ** 0.25 and 0.7 at most. Where we measured it, half or "
        "twice the rate cost up to 3 points of accuracy at epsilon 1, and 1 point at 3 and 8. The "
        "features of one example had norms from 3 to 50 there. Multiply shorter ones by a public "
        "number first: with norm 1, word counts lost 3 to 6 points.",
        "An automatic clip rule scales gradients to about the same norm, so the bound needs no "
        "tuning (Bu et al. 2023). PSAC leaves those well below 0.5 short, so that examples which "
        "are fitted already do not pull as much as the others (Xia et al. 2023). Adam divides by "
        "the size of the gradients, so its learning rate does not depend on the bound.",
        _about_dimension(num_examples, num_parameters, mu),
    )
    return Suggestion(
        num_examples=num_examples,
        epsilon=epsilon,
        delta=budget.delta,
        num_parameters=num_parameters,
        expected_batch_size=batch_size,
        num_steps=steps,
        learning_rate=learning_rate,
        l2_clip=L2_CLIP,
        reasons=reasons,
    )


def _compute(num_examples: int, epochs: float | None, num_gradients: int | None) -> float:
    """How many gradients of one example the run may take."""
    if epochs is not None and num_gradients is not None:
        raise TypeError(
            f"give epochs or num_gradients, or none of them for {EPOCHS:g} epochs or more; got "
            "both. They say the same: num_gradients = epochs * num_examples."
        )
    if num_gradients is not None:
        gradients = float(_validate.count("num_gradients", num_gradients))
    elif epochs is not None:
        gradients = _validate.positive("epochs", epochs) * num_examples
    else:
        gradients = max(EPOCHS * num_examples, float(FEWEST_GRADIENTS))
    if gradients < SMALLEST_COMPUTE:
        raise ValueError(
            f"expected compute for at least {SMALLEST_COMPUTE:,} gradients of one example; got "
            f"{gradients:,.0f}. Pass more epochs: {SMALLEST_COMPUTE / num_examples:.3g} or more."
        )
    return gradients


def _steps_and_batch_size(num_examples: int, gradients: float, mu: float) -> tuple[int, int, float]:
    """Steps, batch size, and the noise of the run relative to that of full batches.

    By the central limit theorem, noise_multiplier**-2 = log(1 + x) with x = (mu num_examples /
    batch_size)^2 / steps. The noise of the mean gradient over the run, noise_multiplier /
    (batch_size sqrt(steps)), is then sqrt(x / log(1 + x)) times that of full batches.
    """
    epochs = gradients / num_examples
    # At a fixed number of epochs, x = mu^2 steps / epochs^2. This x has EXCESS_NOISE.
    largest_x = _x_of(EXCESS_NOISE)
    per_mu = min(epochs / mu, 1e100)  # so that no square overflows
    steps = min(max(largest_x * per_mu**2, FEWEST_STEPS), MOST_STEPS)
    steps = max(min(steps, gradients / SMALLEST_BATCH), 1.0)
    # A batch cannot exceed the data: then each step is a full batch.
    if gradients / steps > num_examples:
        steps = min(max(epochs, 1.0), MOST_STEPS)
    num_steps = math.ceil(steps)
    batch_size = min(max(round(gradients / num_steps), 1), num_examples)
    x = (mu * num_examples / batch_size) ** 2 / num_steps
    excess = math.sqrt(x / math.log1p(x)) if batch_size < num_examples else 1.0
    return num_steps, batch_size, excess


def _x_of(excess: float) -> float:
    """The x at which sqrt(x / log(1 + x)) is `excess`."""
    x = 0.1
    for _ in range(60):  # a contraction near the solution, as the logarithm is flat
        x = excess**2 * math.log1p(x)
    return x


def _about_compute(gradients: float, given: bool, steps: int, batch_size: int) -> str:
    used = steps * batch_size
    if used < 0.9 * gradients:
        return f"The run takes {used:,} gradients of one example. More hardly lowers the noise."
    compute = "compute that you gave" if given else "default compute"
    return (
        f"The run takes {used:,} gradients of one example, which is the {compute}. "
        "More compute allows more steps or larger batches, and is worth it while the accuracy "
        "grows (De et al. 2022, section 3)."
    )


def _about_dimension(num_examples: int, num_parameters: int, mu: float) -> str:
    # Noise of the mean gradient, averaged over the run, in units of the clip bound.
    noise = math.sqrt(num_parameters) / (num_examples * mu)
    if noise > 1:
        return (
            f"The noise on all {num_parameters:,} parameters, averaged over the run, is "
            f"{noise:.2g} times as long as the largest possible gradient. Expect a poor model from "
            "scratch. Train fewer parameters, for example a linear model on good features or "
            "adapters of a pretrained model, or use more data (Tramer and Boneh 2021; Li et al. "
            "2022)."
        )
    return (
        f"The noise on all {num_parameters:,} parameters, averaged over the run, is {noise:.2g} "
        "times as long as the largest possible gradient. Below 1, there is something to learn; "
        "fewer parameters lower it (Tramer and Boneh 2021)."
    )

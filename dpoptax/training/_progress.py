"""Progress of a run: a bar, or calls of functions that may look at the parameters and stop it."""

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias

import attrs
import jax
import numpy as np
import optax

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.accounting import Ledger
from dpoptax.clipping import StatefulClipRule
from dpoptax.clipping._state import AnyClipRule
from dpoptax.reports import round_up
from dpoptax.training._diagnostics import rule_of_step
from dpoptax.training._multihost import from_first_process
from dpoptax.training._train_step import StepInfo, TrainState
from dpoptax.transforms._average import average_like

# The fraction of the running time that may be spent on computing epsilon. A larger one refreshes
# the bar more often and slows the run down.
EPSILON_TIME_FRACTION = 0.005


class Progress(NamedTuple):
    """The progress of a run at one moment.

    Attributes:
        step: steps done.
        num_steps: steps planned.
        epsilon: the cost of the steps done, and of steps that a crash lost.
        delta: the delta of this epsilon.
        seconds_left: an estimate.
        params: the private parameters after `step` steps.
        averaged_params: their average, if the optimizer keeps one by
            `dpoptax.transforms.average_params`; else None.
        nonprivate: diagnostics of the last step; None unless `fit(diagnostics=True)`. They are not
            private: they come from the data without noise.
        l2_clip: the clip bound of the next step, if the clip rule has state; else None. It is
            private, as the parameters are.

    Example:
        >>> progress = Progress(50, 100, epsilon=0.7, delta=1e-5, seconds_left=3.0, params=None)
        >>> f"{progress.step} of {progress.num_steps} steps, epsilon {progress.epsilon}"
        '50 of 100 steps, epsilon 0.7'
    """

    step: int
    num_steps: int
    epsilon: float
    delta: float
    seconds_left: float
    params: PyTree
    averaged_params: PyTree = None
    nonprivate: StepInfo | None = None
    l2_clip: float | None = None


Show: TypeAlias = Callable[[Progress], Any]


@attrs.frozen
class Every:
    """Calls a function at regular times of a run, for example to evaluate the model.

    The function gets a `Progress`. It costs no privacy if it uses only the parameters and data that
    are not in the training set. If it returns True, the run ends. Because the parameters may have
    decided this, the result then guarantees the epsilon of all planned steps. Its report also
    states the epsilon of the steps that ran.

    Attributes:
        function: `function(progress)` returns True to stop; None or False to go on.
        steps: call it each time this many steps ran.
        seconds: call it each time this many seconds passed. Give either this or `steps`.
            The function is also called after the last step.

    Raises:
        TypeError: both or none of the two are given, or they are no numbers.
        ValueError: a number that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, optax, dpoptax
        >>> plan = dpoptax.Plan(
        ...     sampler=dpoptax.samplers.Poisson(200, 20),
        ...     clip=1.0, noise_multiplier=1.0, num_steps=50, delta=1e-4,
        ... )
        >>> result = dpoptax.training.fit(
        ...     lambda mean, x: (mean - x) ** 2, jnp.array(0.0), jnp.ones(200),
        ...     plan=plan, optimizer=optax.sgd(0.1), key=jax.random.key(0),
        ...     progress=Every(lambda progress: progress.params > 0.5, steps=5),
        ... )
        >>> result.stopped, result.num_steps % 5
        ('callback', 0)
    """

    function: Show
    steps: int | None = attrs.field(default=None, kw_only=True)
    seconds: float | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise TypeError(
                f"give either steps or seconds; got "
                f"steps={_validate.described(self.steps)}, "
                f"seconds={_validate.described(self.seconds)}. "
                "Pass one of the two and leave out the other."
            )
        if self.steps is not None:
            _validate.count("steps", self.steps)
        if self.seconds is not None:
            _validate.positive("seconds", self.seconds)


Listener: TypeAlias = Show | Every


class ProgressReporter:
    """Shows progress, and calls the functions of `progress` when they are due.

    The bar and a bare function are called at the end of a run, and whenever computing epsilon costs
    little. In between, a bar only counts steps. It names the step that its epsilon belongs to.
    """

    def __init__(
        self,
        progress: bool | Listener | Sequence[bool | Listener],
        ledger: Ledger,
        *,
        done: int,
        num_steps: int,
    ) -> None:
        self._listeners, has_bar = _listeners_of(progress)
        self._bar = _Bar(done, num_steps) if has_bar else None
        if self._bar is not None:
            self._listeners.append(self._bar.show)
        self._ledger = ledger
        self._started, self._first, self._num_steps = time.monotonic(), done, num_steps
        self._cost = 0.0
        self._shown_at = -float("inf")
        self._called_at = [self._started] * len(self._listeners)

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def steps_to_next_call(self, done: int) -> float:
        """Returns how many steps may run before a function must be called."""
        periods = [one.steps for one in self._listeners if isinstance(one, Every) and one.steps]
        return min((period - done % period for period in periods), default=math.inf)

    def update(
        self, state: TrainState, info: StepInfo | None = None, *, last: bool = False
    ) -> bool:
        """Shows a state whose steps are charged to the ledger; always if `last`.

        Returns whether a function asked to stop.
        """
        done = int(state.step)
        if self._bar is not None:
            self._bar.move_to(done)
        due = self._due(done, last)
        if not due:
            return False
        now = time.monotonic()
        epsilon = self._ledger.epsilon()
        self._shown_at = time.monotonic()
        self._cost = self._shown_at - now
        pace = (now - self._started) / max(done - self._first, 1)
        progress = Progress(
            step=done,
            num_steps=self._num_steps,
            epsilon=epsilon,
            delta=self._ledger.delta,
            seconds_left=pace * (self._num_steps - done),
            params=state.params,
            averaged_params=average_like(state.params, state.opt_state),
            nonprivate=info,
            l2_clip=_bound_of(self._ledger.clip, state.opt_state),
        )
        answers = [_asks_to_stop(self._call(number, progress)) for number in due]
        if any(answers):
            # These parameters are the last ones, so every function gets to see them.
            for number in set(range(len(self._listeners))) - set(due):
                self._call(number, progress)
        return any(answers)

    def _due(self, done: int, last: bool) -> list[int]:
        """The numbers of the listeners to call now."""
        now = time.monotonic()
        # Epsilon may take a second to compute: wait until its cost is small compared with the run.
        is_cheap = now - self._shown_at > self._cost / EPSILON_TIME_FRACTION

        def is_due(number: int, listener: Listener) -> bool:
            if not isinstance(listener, Every):
                return is_cheap
            if listener.steps is not None:
                return done % listener.steps == 0
            waited = now - self._called_at[number]
            # A function may compute on all devices, so every process calls it at the same step.
            return bool(from_first_process(int(waited >= (listener.seconds or 0.0))))

        found = [number for number, one in enumerate(self._listeners) if is_due(number, one)]
        return list(range(len(self._listeners))) if last else found

    def _call(self, number: int, progress: Progress) -> Any:
        listener = self._listeners[number]
        self._called_at[number] = time.monotonic()
        return listener.function(progress) if isinstance(listener, Every) else listener(progress)


class _Bar:
    """A tqdm bar."""

    def __init__(self, done: int, num_steps: int) -> None:
        import tqdm  # only a run with a bar needs it

        self._bar = tqdm.tqdm(total=num_steps, initial=done, unit="step")

    def move_to(self, done: int) -> None:
        self._bar.update(done - self._bar.n)

    def show(self, progress: Progress) -> None:
        epsilon = round_up(progress.epsilon)
        steps = "1 step" if progress.step == 1 else f"{progress.step:,} steps"
        text = f"ε = {epsilon} at δ = {progress.delta:g} after {steps}"
        if progress.l2_clip is not None:
            text += f", clip bound {progress.l2_clip:.3g}"
        if progress.nonprivate is not None:
            text += f"; {_describe(progress.nonprivate)}"
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        self._bar.close()


def _listeners_of(
    progress: bool | Listener | Sequence[bool | Listener],
) -> tuple[list[Listener], bool]:
    """The functions to call, and whether there is a bar."""
    entries: list[Any] = list(progress) if isinstance(progress, list | tuple) else [progress]
    for entry in entries:
        if not (isinstance(entry, bool | Every) or callable(entry)):
            raise TypeError(
                "progress must be True, False, a function, Every(function, ...) or a list of "
                f"these; got {type(entry).__name__}. Pass a function of one Progress."
            )
    listeners = [entry for entry in entries if not isinstance(entry, bool)]
    return listeners, any(entry is True for entry in entries)


def _asks_to_stop(answer: Any) -> bool:
    """Whether a function returned True, as a bool of Python, NumPy or JAX."""
    if answer is None:
        return False
    is_bool = isinstance(answer, bool | np.bool_ | np.ndarray | jax.Array)
    if not is_bool or np.shape(answer) != () or np.asarray(answer).dtype != np.bool_:
        raise TypeError(
            "a function in progress must return True to stop the run, or False or None to go on; "
            f"got {type(answer).__name__}. Store what it computes elsewhere, and return nothing."
        )
    return bool(answer)


def _bound_of(clip: AnyClipRule, opt_state: optax.OptState) -> float | None:
    """The current bound of a clip rule with state; None for another rule."""
    if not isinstance(clip, StatefulClipRule):
        return None
    return float(rule_of_step(clip, opt_state).l2_clip)  # type: ignore[arg-type]


def _describe(info: StepInfo) -> str:
    text = (
        f"not private: loss {float(info.nonprivate_loss):.4g}, "
        f"{float(info.nonprivate_clip_fraction):.0%} clipped, "
        f"median norm {float(info.nonprivate_median_norm):.3g}"
    )
    if count := int(info.nonprivate_nonfinite_count):
        text += f", {count} of {int(info.nonprivate_batch_size)} examples not finite"
    for path, value in jax.tree.leaves_with_path(info.nonprivate_aux):
        if np.size(value) == 1:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "metric"
            text += f", {name} {value.item():.4g}"
    return text

"""A `PeftTrainer` whose train step is a step of a private run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from tunix.sft import metrics_logger
from tunix.sft.peft_trainer import PeftTrainer

import dpoptax.nnx
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.reports import Report
from dpoptax.training import DeviceData, HostData, PrivateRun
from dpoptax.tunix._settings import check_settings


def check_type(trainer: Any) -> None:
    """Raises unless `trainer` is a `PeftTrainer` that trains by its own step."""
    if type(trainer) is not PeftTrainer:
        raise TypeError(
            f"trainer must be a PeftTrainer of Tunix; got {type(trainer).__name__}. A subclass may "
            "train by another step, which is not per example. For such a step use "
            "dpoptax.training.PrivateRun."
        )


def check_data(data: Any) -> None:
    """Raises for data that are no arrays, such as a loader that yields batches."""
    if isinstance(data, DeviceData | HostData):
        return
    for node in [data] if isinstance(data, list) else jax.tree.leaves(data):
        if not isinstance(node, np.ndarray | jax.Array):
            raise TypeError(
                "train_ds must be arrays with one row per example, such as a TrainingInput of all "
                f"training data; got {type(node).__name__}. A loader or a list of batches has "
                "drawn them already, with another guarantee. Pass the arrays, and the plan draws "
                "the batches."
            )


class PrivateTrainer(PeftTrainer):  # type: ignore[misc]
    """A `PeftTrainer` for one run of a plan; see `make_private`."""

    def __init__(self, trainer: PeftTrainer, plan: Plan, **settings: Any) -> None:
        # The state of the trainer, without the work of its `__init__` a second time.
        self.__dict__.update(vars(trainer))
        self.plan = plan
        self._settings = settings
        self._run: PrivateRun | None = None
        self._epsilons: dict[int, float] = {}
        self.clear_jit_cache()

    def train(
        self,
        train_ds: PyTree | DeviceData | HostData,
        eval_ds: Any = None,
        skip_jit: bool = False,
        *,
        cache_nnx_graph: bool = True,
    ) -> None:
        """Makes all steps of the plan, or `max_steps` of them.

        Args:
            train_ds: the training data, as arrays with one row per example.
            eval_ds: batches to evaluate, as in Tunix, which share no people with the training data.
            skip_jit: has no effect.
            cache_nnx_graph: as in Tunix, for evaluation.

        Raises:
            TypeError: see `make_private`.
            ValueError: see `make_private`; or a second call.
        """
        del skip_jit
        if self._run is not None:
            raise ValueError(
                "expected one call of train for one plan; got a second one. Make a new trainer, "
                "and a plan for its steps. The epsilons of both runs add up."
            )
        check_settings(self, self.plan)
        check_data(train_ds)
        loss_fn, params = dpoptax.nnx.loss_fn(self.model, self._loss(), wrt=self.optimizer.wrt)
        with PrivateRun(
            loss_fn,
            jax.tree.map(_uncommitted, params),
            train_ds,
            plan=self.plan,
            optimizer=self.optimizer.tx,
            **self._settings,
        ) as run:
            self._run = run
            if self.train_steps > run.ledger.num_steps:
                raise ValueError(
                    f"expected a checkpoint of Tunix with the {run.ledger.num_steps} steps that "
                    f"the folder of the run knows, or fewer; got one with {self.train_steps}. Its "
                    "weights cost privacy that is not counted. Pass the folder of that run, or "
                    "start in an empty checkpoint_root_directory."
                )
            self._take_over()
            self._train_steps = self._iter_steps = run.steps_done
            # One empty batch for each step. Tunix skips those before `_iter_steps`.
            batches = [()] * (run.steps_left if self.is_managed_externally else self.plan.num_steps)
            # Without `skip_jit` it would look for the compiled step of its own.
            super().train(batches, eval_ds, skip_jit=True, cache_nnx_graph=cache_nnx_graph)

    def report(self) -> Report:
        """Returns the privacy statement of the steps that ran.

        Raises:
            ValueError: `train` was not called.
        """
        return self._started().report()

    def epsilon(self, delta: float | None = None) -> float:
        """Returns the epsilon of the steps that ran.

        Raises:
            ValueError: `train` was not called.
        """
        return self._started().epsilon(delta)

    def jit_train_and_eval_step(
        self, skip_jit: bool = False, cache_nnx_graph: bool = False
    ) -> tuple[Any, Any]:
        """Returns a step of the run, and the compiled evaluation of Tunix."""
        _, eval_step = super().jit_train_and_eval_step(False, cache_nnx_graph)
        return self._private_step, eval_step

    def with_data_hooks(self, data_hooks: Any) -> None:
        """Refuses hooks that load batches."""
        self.data_hooks = data_hooks
        check_settings(self, self.plan)

    def _private_step(self, batch: tuple[()]) -> tuple[Array, None, Array]:
        del batch
        run = self._started()
        run.step()
        self._take_over()
        # Not at each step: an epsilon takes longer than a small step.
        if not run.steps_left or run.steps_done % self.config.eval_every_n_steps == 0:
            self._epsilons[run.steps_done] = run.epsilon()
        # In place of the loss and the gradient norm, which are not private.
        nothing = jnp.full((), jnp.nan, jnp.float32)
        return nothing, None, nothing

    def _take_over(self) -> None:
        """Gives the model and the optimizer of Tunix the arrays of the run, for its checkpoints."""
        run = self._started()
        _, opt_state = run.state.opt_state
        nnx.update(self.model, run.params)
        nnx.update(self.optimizer.opt_state, nnx.state(nnx.as_pure(opt_state)))
        self.optimizer.step[...] = run.steps_done

    def _loss(self) -> Any:
        """The loss of one example, from the functions of the trainer for a batch."""
        loss, inputs_of, has_aux = self.loss_fn, self.gen_model_input_fn, self._has_aux

        def of_example(model: nnx.Module, example: PyTree) -> Float[Array, ""]:
            batch = jax.tree.map(lambda leaf: leaf[None], example)
            value = loss(model, **inputs_of(batch))
            return value[0] if has_aux else value

        return of_example

    def _log_metrics(self, loss: Any, step: Any = None, additional_metrics: Any = None) -> None:
        """Logs epsilon in place of the loss of the training data."""
        if self._mode != metrics_logger.Mode.TRAIN:
            super()._log_metrics(loss, step, additional_metrics)
            return
        if step in self._epsilons:
            self.metrics_logger.log(
                self.metrics_prefix, "epsilon", self._epsilons[step], self._mode, step
            )

    @property
    def _tqdm_train_metrics(self) -> list[str]:
        # The bar shows means over all steps so far, which is wrong for an epsilon.
        return []

    def _started(self) -> PrivateRun:
        if self._run is None:
            raise ValueError(
                "expected a call of train before; got none. For the epsilon of all planned steps, "
                "call plan.epsilon()."
            )
        return self._run


def _uncommitted(leaf: Array) -> Array:
    """Returns an array that is not bound to its device.

    Restored arrays are. That shows in the program of the run, which would then draw other noise.
    """
    return leaf if len(leaf.sharding.device_set) > 1 else jnp.asarray(np.asarray(leaf))

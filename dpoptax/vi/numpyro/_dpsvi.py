"""A NumPyro model and guide in, private parameters out: NumPyro's SVI with a clip and noise.

The methods are those of SVI, and the arguments those of d3p's class of the same name, so that a
script of either moves over by its imports. The gradients are `numpyro_elbo`'s.

Needs NumPyro: pip install 'dpoptax[numpyro]'.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree
from numpyro.infer import ELBO

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax.per_example import value_and_per_example_grads
from dpoptax.random import split_by_purpose
from dpoptax.random._derive import derive_key
from dpoptax.samplers import Sampler
from dpoptax.training import FitResult, fit
from dpoptax.transforms._privatize import privatize
from dpoptax.vi.numpyro._elbo import NumPyroElbo, numpyro_elbo


class SVIState(NamedTuple):
    """What the next update needs. It holds keys, so it must not be released."""

    params: PyTree
    opt_state: Any
    model_key: PRNGKeyArray
    step: Array


@dataclasses.dataclass(frozen=True)
class SVIRunResult:
    """What `DPSVI.run` leaves behind.

    Attributes:
        params: values of `numpyro.param` sites, for `Predictive`.
        fit: plan, ledger and report of what ran.
    """

    params: dict[str, PyTree]
    fit: FitResult

    def report(self) -> Any:
        """Returns the privacy statement; see `dpoptax.accounting.Report`."""
        return self.fit.report()


class DPSVI:
    """Stochastic variational inference with a clip for every example and noise on their sum.

    Attributes:
        model: as in `numpyro_elbo`.
        guide: as in `numpyro_elbo`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, dpoptax
        >>> import numpyro.distributions as dist
        >>> from numpyro.infer import Trace_ELBO
        >>> def model(x):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", 200, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = numpyro.infer.autoguide.AutoNormal(model)
        >>> with jax.numpy_dtype_promotion("standard"):
        ...     svi = DPSVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO(),
        ...                 clipping_threshold=2.0, dp_scale=1.0, num_obs_total=200)
        ...     result = svi.run(dpoptax.random.insecure_key(0), 100, jnp.ones(200),
        ...                      sampler=dpoptax.samplers.Poisson(200, 20), progress_bar=False)
        >>> abs(float(result.params["mean_auto_loc"]) - 1) < 0.3
        True

    Reference: Prediger et al. 2022, arXiv:2103.11648; Jälkö, Dikmen and Honkela 2017,
    arXiv:1610.08749.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: ELBO,
        clipping_threshold: float,
        dp_scale: float,
        *,
        num_obs_total: int,
        expected_batch_size: float | None = None,
        kl: Literal["after_noise", "clipped"] = "after_noise",
        **static_kwargs: Any,
    ) -> None:
        """Takes what makes an update.

        Args:
            model: as in `numpyro_elbo`; positional arguments are data with a leading axis.
            guide: as in `numpyro_elbo`.
            optim: an optimizer of `numpyro.optim` or Optax.
            loss: as in `numpyro_elbo`.
            clipping_threshold: the bound on the gradient of one example, per example: of
                the ELBO divided by `num_obs_total`.
            dp_scale: the noise multiplier.
            num_obs_total: how many examples there are.
            expected_batch_size: what the noisy sum is divided by; by default the length of the
                batches, which masked batches do not have.
            kl: as in `numpyro_elbo`.
            **static_kwargs: further arguments of model and guide.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: a number out of range.
        """
        self.model, self.guide, self._loss, self._kl = model, guide, loss, kl
        self._optimizer = _as_optax(optim)
        self._clip = _validate.positive("clipping_threshold", clipping_threshold)
        self._noise = _validate.non_negative("dp_scale", dp_scale)
        self._num_examples = _validate.num_examples(num_obs_total)
        self._size = expected_batch_size
        if expected_batch_size is not None:
            self._size = _validate.positive("expected_batch_size", expected_batch_size)
        self._kwargs = static_kwargs
        self._elbo: NumPyroElbo | None = None
        self._tx: optax.GradientTransformation | None = None
        self._expected = 0.0

    def init(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> SVIState:
        """Returns the state before the first update.

        Args:
            rng_key: one root key; a secure one for what shall be private.
            *args: a batch, of which only shapes and types are looked at.
            **kwargs: further arguments of model and guide.

        Returns:
            The state of `update`.

        Raises:
            TypeError: an old-style key.
            ValueError: as `numpyro_elbo`.
        """
        keys = split_by_purpose(_validate.typed_key("rng_key", rng_key))
        self._expected = self._size or float(_validate.leading_axis_size("args", args))
        size = self._expected
        elbo = self._objective(keys.model_key, args, kwargs)
        private = privatize(self._clip, self._noise, expected_batch_size=size, key=keys.noise_key)
        around = elbo.around(private, derive_key(keys.model_key, "divergence"))
        self._elbo, self._tx = elbo, optax.chain(around, self._optimizer)
        params = elbo.init()
        model_key = derive_key(keys.model_key, "examples")
        return SVIState(params, self._tx.init(params), model_key, jnp.zeros((), jnp.int32))

    def update(
        self, svi_state: SVIState, *args: Any, mask: Bool[Array, " batch"] | None = None
    ) -> tuple[SVIState, Float[Array, ""]]:
        """Makes one private update.

        Args:
            svi_state: of `init` or of another update.
            *args: a batch; without an `expected_batch_size` as long as that of `init`.
            mask: True for real examples; a batch with a mask needs `expected_batch_size`.

        Returns:
            The state, and the negative ELBO on the batch, which is not private.

        Raises:
            RuntimeError: before `init`.
            ValueError: a batch that is not of the size expected, masked or longer or shorter.
        """
        elbo, tx = self._made()
        if mask is not None and self._size is None:
            raise ValueError(
                "a masked batch is longer than it expects to be: tell DPSVI its "
                "expected_batch_size, sampling rate times num_obs_total."
            )
        length = _validate.leading_axis_size("args", args)
        if self._size is None and length != self._expected:
            raise ValueError(
                f"init was given a batch of {self._expected:.0f} and took that for the expected "
                f"size, by which sums are divided; update got one of {length}. Tell DPSVI its "
                "expected_batch_size, or give init a batch like those of update."
            )
        key, kl_key = jax.random.split(jax.random.fold_in(svi_state.model_key, svi_state.step))
        losses, grads = value_and_per_example_grads(elbo.loss)(
            svi_state.params, args, mask=mask, key=key
        )
        updates, opt_state = tx.update(grads, svi_state.opt_state, svi_state.params)
        total = self._on_all(elbo, svi_state.params, losses, mask, kl_key)
        params = optax.apply_updates(svi_state.params, updates)
        step = svi_state.step + 1
        return SVIState(params, opt_state, svi_state.model_key, step), total

    def evaluate(self, svi_state: SVIState, *args: Any) -> Float[Array, ""]:
        """Returns the negative ELBO of all the data, estimated on a batch; not private."""
        elbo, _ = self._made()
        key, kl_key = jax.random.split(jax.random.fold_in(svi_state.model_key, svi_state.step))
        keys = jax.random.split(key, _validate.leading_axis_size("args", args))
        losses = jax.vmap(elbo.loss, in_axes=(None, 0, 0))(svi_state.params, args, keys)
        return self._on_all(elbo, svi_state.params, losses, None, kl_key)

    def get_params(self, svi_state: SVIState) -> dict[str, PyTree]:
        """Returns the values of `numpyro.param` sites, as `Predictive` takes them."""
        return self._made()[0].constrain(svi_state.params)

    def run(
        self,
        rng_key: PRNGKeyArray,
        num_steps: int,
        *args: Any,
        sampler: Sampler,
        delta: float | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Trains on batches that a sampler draws; the result knows what it cost.

        Args:
            rng_key: one root key.
            num_steps: how many updates.
            *args: all the data, with a leading axis of `num_obs_total`.
            sampler: of `dpoptax.samplers`.
            delta: of the guarantee; a tenth of 1 / num_obs_total by default.
            progress_bar: whether to show one.
            **kwargs: further arguments of model and guide.

        Returns:
            The parameters, and the report of what ran.

        Raises:
            TypeError: an argument of the wrong kind.
            ValueError: as `numpyro_elbo`; data that are NaN where the model observes them.
        """
        keys = split_by_purpose(_validate.typed_key("rng_key", rng_key))
        self._elbo = elbo = self._objective(keys.model_key, args, kwargs)
        elbo.check_data(args)
        plan = Plan(
            sampler=sampler,
            clip=self._clip,
            noise_multiplier=self._noise,
            num_steps=num_steps,
            delta=0.1 / self._num_examples if delta is None else delta,
        )
        result = fit(
            elbo,
            elbo.init(),
            args,
            plan=plan,
            optimizer=self._optimizer,
            key=derive_key(rng_key, "run"),
            progress=progress_bar,
        )
        return SVIRunResult(elbo.constrain(result.params), result)

    def _objective(self, key: PRNGKeyArray, args: Any, kwargs: dict[str, Any]) -> NumPyroElbo:
        return numpyro_elbo(
            self.model,
            self.guide,
            *args,
            num_examples=self._num_examples,
            loss=self._loss,
            kl=self._kl,
            init_key=derive_key(key, "initial values"),
            **self._kwargs,
            **kwargs,
        )

    def _made(self) -> tuple[NumPyroElbo, optax.GradientTransformation]:
        if self._elbo is None or self._tx is None:
            raise RuntimeError("call init(rng_key, *batch) first: it looks at model and guide.")
        return self._elbo, self._tx

    def _on_all(
        self, elbo: NumPyroElbo, params: PyTree, losses: Array, mask: Any, key: PRNGKeyArray
    ) -> Array:
        count = len(losses) if mask is None else jnp.maximum(jnp.sum(mask), 1)
        total = self._num_examples * jnp.sum(losses) / count
        return total if elbo.kl_clipped else total + elbo.kl(params, key)


def _as_optax(optim: Any) -> optax.GradientTransformation:
    """An optimizer of NumPyro, whose state holds the parameters, as one of Optax."""
    if isinstance(optim, optax.GradientTransformation):
        return optim
    if not all(hasattr(optim, name) for name in ("init", "update", "get_params")):
        raise TypeError(
            f"optim must be an optimizer of numpyro.optim or Optax; got {type(optim).__name__}."
        )

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        del params
        before = optim.get_params(state)
        state = optim.update(updates, state)
        return jax.tree.map(jnp.subtract, optim.get_params(state), before), state

    return optax.GradientTransformation(optim.init, update)

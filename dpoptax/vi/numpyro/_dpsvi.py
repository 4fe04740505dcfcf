"""DPSVI: NumPyro's stochastic variational inference with clipped and noised gradients.

The methods are those of `numpyro.infer.SVI`, and the arguments those of the class of the same name
in d3p. A script for either needs only new imports. The gradients come from `numpyro_elbo`.

Reference: Prediger et al. 2022, arXiv:2103.11648.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.infer
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from dpoptax import _validate
from dpoptax._plan import Plan
from dpoptax._pytree import PyTree
from dpoptax.per_example import value_and_per_example_grads
from dpoptax.per_example._validate_loss import batch_mask
from dpoptax.random import split_by_purpose
from dpoptax.random._derive import derive_key
from dpoptax.samplers import Sampler
from dpoptax.transforms import chain, privatize
from dpoptax.vi.numpyro._data_arguments import columns, plain, real_rows
from dpoptax.vi.numpyro._elbo import NumPyroElbo, numpyro_elbo
from dpoptax.vi.numpyro._optimizer import as_optax
from dpoptax.vi.numpyro._options_of_d3p import pass_num_obs_total, refuse_options_of_d3p
from dpoptax.vi.numpyro._run import mean_of, run_svi, start_of, total_loss
from dpoptax.vi.numpyro._state import SVIRunResult, SVIState


class DPSVI:
    """Stochastic variational inference that clips every example's gradient and adds noise.

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

    Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        loss: numpyro.infer.ELBO,
        clipping_threshold: float,
        dp_scale: float,
        *,
        num_obs_total: int,
        expected_batch_size: float | None = None,
        kl: Literal["after_noise", "clipped"] = "after_noise",
        **static_kwargs: Any,
    ) -> None:
        """Stores the parts of an update; `init` puts them together.

        Args:
            model: as in `numpyro_elbo`. It gets `num_obs_total` if it has such an argument.
            guide: as in `numpyro_elbo`.
            optim: an optimizer of `numpyro.optim` or Optax.
            loss: as in `numpyro_elbo`.
            clipping_threshold: bound on the norm of the gradient of one example, without scales.
            dp_scale: the noise multiplier.
            num_obs_total: number of examples, a public constant.
            expected_batch_size: divides the noisy sum; by default the length of a batch, unmasked.
            kl: as in `numpyro_elbo`.
            **static_kwargs: further arguments of model and guide.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a number out of range.
        """
        refuse_options_of_d3p(static_kwargs)
        self.model: Callable[..., Any] = model
        self.guide: Callable[..., Any] = guide
        self._loss, self._kl, self._kwargs = loss, kl, static_kwargs
        self._optimizer = as_optax(optim)
        self._clip = _validate.positive("clipping_threshold", clipping_threshold)
        self._noise_multiplier = _validate.non_negative("dp_scale", dp_scale)
        self._num_examples = _validate.num_examples(num_obs_total)
        self._given_batch_size = expected_batch_size
        if expected_batch_size is not None:
            self._given_batch_size = _validate.positive("expected_batch_size", expected_batch_size)
        self._elbo: NumPyroElbo | None = None
        self._tx: optax.GradientTransformation | None = None
        self._expected_batch_size = 0.0

    def init(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> SVIState:
        """Returns the state before the first update.

        Args:
            rng_key: one root key; use a secure one for private results.
            *args: a batch, as in `update`. It is checked; only its shapes and dtypes are used.
            **kwargs: more arguments of model and guide; arrays as long as the batch are data.

        Returns:
            The state for `update`.

        Raises:
            TypeError: an old-style key.
            ValueError: as in `numpyro_elbo` and `NumPyroElbo.check_data`.
        """
        keys = split_by_purpose(_validate.typed_key("rng_key", rng_key))
        (args, kwargs), masks = plain((args, kwargs))
        self._refuse_masks(masks)
        elbo, data = self._objective(keys.model_key, args, kwargs)
        size = self._given_batch_size or float(_validate.leading_axis_size("args", data))
        elbo.check_data(real_rows(data, masks))
        private = privatize(
            self._clip, self._noise_multiplier, expected_batch_size=size, key=keys.noise_key
        )
        # One key per purpose: the initial values were drawn from another one.
        wrapped = elbo.wrap(private, derive_key(keys.model_key, "divergence"))
        # SVI's interface returns the state alone, so these are kept for `update`.
        self._elbo, self._tx = elbo, chain(wrapped, self._optimizer)
        self._expected_batch_size = size
        params, model_key = elbo.init(), derive_key(keys.model_key, "examples")
        return SVIState(params, self._tx.init(params), model_key, jnp.zeros((), jnp.int32))

    def update(
        self,
        svi_state: SVIState,
        *args: Any,
        mask: Bool[Array, " batch"] | None = None,
        **kwargs: Any,
    ) -> tuple[SVIState, Float[Array, ""]]:
        """Makes one private update.

        Args:
            svi_state: the state of `init` or of another update.
            *args: a batch: arrays, or `dpoptax.samplers.take(data, batch)`, which has a mask.
                Without an `expected_batch_size` it must be as long as that of `init`.
            mask: True for real examples; a batch with a mask needs `expected_batch_size`.
            **kwargs: the data that `init` got by keyword.

        Returns:
            The state, and the negative ELBO on the batch, which is not private.

        Raises:
            RuntimeError: `init` has not been called.
            ValueError: a batch of another length or with a mask, without `expected_batch_size`.
        """
        elbo, tx = self._initialized()
        (args, kwargs), masks = plain((args, kwargs))
        args = elbo.data(args, kwargs)
        if mask is not None:
            masks = [*masks, mask]
        self._check_batch(args, masks)
        rows = batch_mask(args, None, *masks)
        # `kl_key` is for the loss that is shown; the gradient of the divergence draws its own.
        key, kl_key = jax.random.split(jax.random.fold_in(svi_state.model_key, svi_state.step))
        # The divergence may train a parameter that the likelihood leaves out.
        losses, grads = value_and_per_example_grads(elbo.loss, allow_unused=True)(
            svi_state.params, args, mask=rows, key=key
        )
        updates, opt_state = tx.update(grads, svi_state.opt_state, svi_state.params)
        loss = total_loss(elbo, svi_state.params, mean_of(losses, rows), kl_key)
        params = optax.apply_updates(svi_state.params, updates)
        return SVIState(params, opt_state, svi_state.model_key, svi_state.step + 1), loss

    def evaluate(self, svi_state: SVIState, *args: Any, **kwargs: Any) -> Float[Array, ""]:
        """Returns the negative ELBO of all the data, estimated on a batch; it is not private."""
        elbo, _ = self._initialized()
        key, kl_key = jax.random.split(jax.random.fold_in(svi_state.model_key, svi_state.step))
        (args, kwargs), masks = plain((args, kwargs))
        args = elbo.data(args, kwargs)
        rows = batch_mask(args, None, *masks)
        keys = jax.random.split(key, len(rows))
        losses = jax.vmap(elbo.loss, in_axes=(None, 0, 0))(svi_state.params, args, keys)
        return total_loss(elbo, svi_state.params, mean_of(losses, rows), kl_key)

    def get_params(self, svi_state: SVIState) -> dict[str, PyTree]:
        """Returns the values of `numpyro.param` sites, as `Predictive` takes them."""
        return self._initialized()[0].constrain(svi_state.params)

    def run(
        self,
        rng_key: PRNGKeyArray,
        num_steps: int,
        *args: Any,
        sampler: Sampler,
        delta: float | None = None,
        progress_bar: bool = True,
        init_params: Mapping[str, PyTree] | None = None,
        init_state: SVIRunResult | None = None,
        nonprivate_losses: bool = False,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Trains on batches of a sampler, and accounts for the privacy loss.

        Args:
            rng_key: one root key; use a secure one for private results.
            num_steps: number of updates.
            *args: all the data, with a leading axis of `num_obs_total`.
            sampler: a sampler of `dpoptax.samplers`.
            delta: delta of the guarantee; the default is 0.1 / num_obs_total.
            progress_bar: whether to show one.
            init_params: initial values of some `numpyro.param` sites, which must be public. If an
                earlier run on the same data made them, its cost adds to that of this run.
            init_state: the result of an earlier run on the same data, to go on at its last iterate
                with the state of its optimizer. Its cost is in the report of this run, too.
            nonprivate_losses: whether to keep losses, for your own eyes only.
            **kwargs: as in `init`.

        Returns:
            Recommended parameters and the last iterate, draws from the posterior, whether the
            parameters have settled, and the report of the run.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: as in `numpyro_elbo` and `NumPyroElbo.check_data`; or a warm start that does
                not fit, or with the key of the earlier run.
        """
        # `fit` splits its own root key, so only the initial values are drawn from these.
        keys = split_by_purpose(_validate.typed_key("rng_key", rng_key))
        self._elbo, data = elbo, _ = self._objective(keys.model_key, args, kwargs)
        start = start_of(elbo, self._optimizer, init_params, init_state, rng_key)
        elbo.check_data(data)
        plan = Plan(
            sampler=sampler,
            clip=self._clip,
            noise_multiplier=self._noise_multiplier,
            num_steps=num_steps,
            delta=0.1 / self._num_examples if delta is None else delta,
        )
        return run_svi(
            elbo,
            data,
            start,
            plan,
            rng_key,
            progress_bar=progress_bar,
            nonprivate_losses=nonprivate_losses,
        )

    def _check_batch(self, args: Any, masks: list[Any]) -> None:
        """Refuses a batch whose expected size is unknown: the sums would be scaled wrongly."""
        self._refuse_masks(masks)
        if self._given_batch_size is not None:
            return
        length = _validate.leading_axis_size("args", args)
        if length != self._expected_batch_size:
            raise ValueError(
                f"init got a batch of {self._expected_batch_size:.0f}, the expected batch size by "
                f"which the noisy sum is divided; update got one of {length}. Pass "
                "DPSVI(..., expected_batch_size=...), or give init a batch like those of update."
            )

    def _refuse_masks(self, masks: list[Any]) -> None:
        if masks and self._given_batch_size is None:
            raise ValueError(
                "a batch with a mask is longer than its expected size, by which the noisy sum is "
                "divided. Pass DPSVI(..., expected_batch_size=sampling rate times num_obs_total)."
            )

    def _objective(
        self, key: PRNGKeyArray, args: Any, kwargs: dict[str, Any]
    ) -> tuple[NumPyroElbo, tuple[Any, ...]]:
        """Returns the objective, and all data as one tuple."""
        kwargs = {**self._kwargs, **kwargs}
        total = self._num_examples
        model, guide, kwargs = pass_num_obs_total(self.model, self.guide, kwargs, total)
        args = tuple(columns(f"args[{i}]", arg) for i, arg in enumerate(args))
        elbo = numpyro_elbo(
            model,
            guide,
            *args,
            num_examples=total,
            loss=self._loss,
            kl=self._kl,
            init_key=derive_key(key, "initial values"),
            **kwargs,
        )
        return elbo, elbo.data(args, {name: kwargs[name] for name in elbo.program.data_names})

    def _initialized(self) -> tuple[NumPyroElbo, optax.GradientTransformation]:
        if self._elbo is None or self._tx is None:
            raise RuntimeError("call init(rng_key, *batch) before any other method but run.")
        return self._elbo, self._tx

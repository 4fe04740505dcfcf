"""DPSVI with the arguments and step lengths of `d3p.svi`.

The step is that of `dpoptax.vi.numpyro.DPSVI`: gradients of examples are clipped without the scale
of the plate, summed, noised and divided by the expected batch size. As in d3p the divergence from
the prior is inside the clip, and the gradient is multiplied by the scale again, so that learning
rates of d3p's scripts keep their meaning.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpyro.infer
import optax
from jaxtyping import Array, Float
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from dpoptax import _validate
from dpoptax._masked_examples import MaskedExamples
from dpoptax.accounting import epsilon
from dpoptax.accounting._epsilon import event_privacy_loss
from dpoptax.compat.d3p import random as strong_rng
from dpoptax.compat.d3p._gradients import (
    clip_gradient,
    full_norm,
    get_observations_scale,
    normalize_gradient,
    plate_size,
)
from dpoptax.compat.d3p._laws import NoiseFor, law_of, num_steps
from dpoptax.compat.d3p._suites import as_key, check_suite
from dpoptax.samplers import Poisson, Sampler
from dpoptax.vi import numpyro as vi
from dpoptax.vi.numpyro._options_of_d3p import takes
from dpoptax.vi.numpyro._state import SVIState

__all__ = [
    "DPSVI",
    "clip_gradient",
    "full_norm",
    "get_observations_scale",
    "normalize_gradient",
]


def __dir__() -> list[str]:
    return __all__


DPSVIState = SVIState


class DPSVI(vi.DPSVI):
    """d3p's class: private variational inference for a NumPyro model.

    `init`, `update`, `evaluate` and `get_params` are those of `dpoptax.vi.numpyro.DPSVI`, and so is
    `run`, which needs a sampler.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from dpoptax.compat import d3p
        >>> def model(x, num_obs_total):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with numpyro.plate("data", num_obs_total, subsample_size=len(x)):
        ...         numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> guide = numpyro.infer.autoguide.AutoNormal(model)
        >>> svi = DPSVI(model, guide, numpyro.optim.Adam(0.1), numpyro.infer.Trace_ELBO(),
        ...             clipping_threshold=2.0, dp_scale=1.0, num_obs_total=200)
        >>> init_batches, get_batch = d3p.poisson_batchify_data((jnp.ones(200),), q=0.1)
        >>> num_batches, batches = init_batches(d3p.random.PRNGKey(1))
        >>> batch, mask = get_batch(0, batches)
        >>> with jax.numpy_dtype_promotion("standard"):
        ...     state = svi.init(d3p.random.PRNGKey(0), *batch)
        ...     state, loss = svi.update(state, *batch, mask=mask)
        >>> round(svi.get_epsilon(1e-3, q=0.1, num_epochs=1), 1)
        1.6

    Reference: Jälkö, Dikmen and Honkela 2017, arXiv:1610.08749.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any,
        per_example_loss: numpyro.infer.ELBO,
        clipping_threshold: float,
        dp_scale: float,
        rng_suite: Any = strong_rng,
        clip_unscaled_observations: bool = True,
        *,
        num_obs_total: int | None = None,
        expected_batch_size: float | None = None,
        kl: Literal["after_noise", "clipped"] = "clipped",
        **static_kwargs: Any,
    ) -> None:
        """Stores the parts of an update; `init` puts them together.

        Args:
            model: as in `dpoptax.vi.numpyro.DPSVI`.
            guide: likewise.
            optim: an optimizer of `numpyro.optim` or Optax.
            per_example_loss: `Trace_ELBO()` or `TraceMeanField_ELBO()`.
            clipping_threshold: bound on the norm of the gradient of one example.
            dp_scale: the noise multiplier.
            rng_suite: `dpoptax.compat.d3p.random`. The type of the key decides which generator
                draws.
            clip_unscaled_observations: False bounds the gradient with the scale of the plate; this
                is the threshold divided by the scale.
            num_obs_total: number of examples, a public constant. It is passed on to a model or
                guide that takes it. By default the size of the plate over the data.
            expected_batch_size: divides the noisy sum. By default that of the sampler which drew
                the batch for `init`, or the length of that batch.
            kl: "clipped" as in d3p, or "after_noise", which is more accurate.
            **static_kwargs: further arguments of model and guide.

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a number out of range.
        """
        check_suite(rng_suite)
        super().__init__(
            model,
            guide if isinstance(guide, AutoGuide) else _ObservedAsFixed(guide),
            optim,
            per_example_loss,
            clipping_threshold,
            dp_scale,
            num_obs_total=1 if num_obs_total is None else num_obs_total,
            expected_batch_size=expected_batch_size,
            kl=kl,
            **static_kwargs,
        )
        self._given_noise = dp_scale
        self._knows_num_obs_total = num_obs_total is not None
        self._clips_unscaled = clip_unscaled_observations
        self._given_clip, self._given_optimizer = self._clip, self._optimizer
        self._laws: dict[str, set[Sampler | None]] = {"init": set(), "update": set()}
        self._unmasked_lengths: set[int] = set()

    def init(self, rng_key: Any, *args: Any, **kwargs: Any) -> SVIState:
        """Returns the state before the first update; see `dpoptax.vi.numpyro.DPSVI.init`."""
        self._note_law("init", args, kwargs, None)
        return super().init(as_key(rng_key), *args, **kwargs)

    def update(
        self, svi_state: SVIState, *args: Any, mask: Any = None, **kwargs: Any
    ) -> tuple[SVIState, Float[Array, ""]]:
        """Makes one private update; see `dpoptax.vi.numpyro.DPSVI.update`."""
        if isinstance(mask, bool):
            length = _validate.leading_axis_size("args", (args, kwargs))
            mask = None if mask else jnp.zeros(length, bool)
        self._note_law("update", args, kwargs, mask)
        return super().update(svi_state, *args, mask=mask, **kwargs)

    def run(self, rng_key: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains on batches of a sampler; see `dpoptax.vi.numpyro.DPSVI.run`."""
        if "sampler" in kwargs:
            self._note_sampler("update", kwargs["sampler"])
        return super().run(as_key(rng_key), *args, **kwargs)

    def get_epsilon(
        self,
        target_delta: float,
        q: float,
        num_epochs: float | None = None,
        num_iter: float | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> float:
        """Returns epsilon of the updates, under the sampler that drew their batches.

        Args:
            target_delta: strictly between 0 and 1.
            q: the sampling rate, which is compared with that of the sampler.
            num_epochs: how many epochs are made, each of 1 / q updates, or of as many as the
                batchifier says if that is more; or
            num_iter: how many updates are made, each with a new draw.
            sampler: how batches were drawn, if it is not known, as of batches that were changed or
                come from elsewhere. By default that of the batches that `update` got, or `init` if
                there was no update.

        Returns:
            Epsilon, an upper bound. Neighbours differ by one example more or less for
            `poisson_batchify_data`, by the value of one example for `subsample_batchify_data`, and
            by one example that is replaced by an empty one for `split_batchify_data`.

        Raises:
            TypeError: both or neither of `num_epochs` and `num_iter`.
            ValueError: the sampler is unknown, has another rate, or is not that of the batches.
        """
        law = self._law(q, sampler)
        steps = num_steps(law, q, num_epochs, num_iter)
        return epsilon(
            sampler=law, noise_multiplier=self._noise_multiplier, num_steps=steps,
            delta=target_delta,
        )  # fmt: skip

    def get_delta(
        self,
        target_epsilon: float,
        q: float,
        num_epochs: float | None = None,
        num_iter: float | None = None,
        *,
        sampler: Sampler | None = None,
    ) -> float:
        """Returns delta of the updates at an epsilon; the arguments are those of `get_epsilon`."""
        law = self._law(q, sampler)
        steps = num_steps(law, q, num_epochs, num_iter)
        if self._noise_multiplier == 0:
            return 1.0
        event = law.event(self._noise_multiplier, steps, law.relation)
        loss = event_privacy_loss(event, delta=1e-10, relation=law.relation)
        return loss.delta(target_epsilon)

    def _note_law(self, where: str, args: Any, kwargs: Any, mask: Any) -> None:
        batch = [arg for arg in (*args, *kwargs.values()) if jax.tree.leaves(arg)]
        law = law_of(batch)
        self._note_sampler(where, law)
        has_mask = mask is not None or any(isinstance(arg, MaskedExamples) for arg in batch)
        if has_mask and self._given_batch_size is None and law is not None:
            self._given_batch_size = float(law.expected_batch_size)  # type: ignore[arg-type]
        if not has_mask and any(isinstance(law, Poisson) for law in self._laws["init"]):
            raise ValueError(
                "init got a Poisson batch, but this batch has no mask. A padded row that counts "
                "breaks the guarantee: pass mask=, or the columns of poisson_batchify_data as they "
                "are."
            )
        if where == "update" and not has_mask:
            self._unmasked_lengths.add(_validate.leading_axis_size("args", (args, kwargs)))

    def _note_sampler(self, where: str, law: Sampler | None) -> None:
        self._laws[where].add(law)
        if isinstance(self._given_noise, NoiseFor):
            self._given_noise.check(law)

    def _law(self, q: float, sampler: Sampler | None) -> Sampler:
        laws = self._laws["update"] or self._laws["init"]
        if sampler is None:
            known = next(iter(laws)) if len(laws) == 1 else None
            if known is None:
                raise ValueError(
                    "epsilon depends on how batches are drawn, which is not known: call init or "
                    "update with the arrays that one get_batch returned, or pass the sampler that "
                    "drew them, for example "
                    "sampler=dpoptax.samplers.FixedSize(num_obs_total, batch_size)."
                )
            sampler = known
        else:
            self._check_given(sampler)
        size = float(sampler.expected_batch_size)  # type: ignore[arg-type]
        if not abs(_validate.real("q", q) * sampler.num_examples - size) < 1:
            raise ValueError(
                f"q is the rate of the batches that were drawn, {size:g} of "
                f"{sampler.num_examples}; got {q:g}. Pass {size / sampler.num_examples:g}."
            )
        return sampler

    def _check_given(self, sampler: Sampler) -> None:
        others = (self._laws["init"] | self._laws["update"]) - {None, sampler}
        if others:
            raise ValueError(
                f"sampler is {sampler}, but batches were drawn by {others.pop()}. Leave sampler "
                "out, and pass the arrays of get_batch to update as they are."
            )
        whole = sampler.expected_batch_size == sampler.num_examples
        if isinstance(sampler, Poisson) and not whole and len(self._unmasked_lengths) == 1:
            raise ValueError(
                "sampler is Poisson, but all batches had one length and no mask. Pass the mask of "
                "padded Poisson batches to update, or the sampler of batches of a fixed size, "
                "dpoptax.samplers.FixedSize."
            )

    def _objective(self, key: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not self._knows_num_obs_total:
            self._num_examples = plate_size(self.model, args, {**self._kwargs, **kwargs})
        elif takes(self.model, by_keywords=True) and takes(self.guide, by_keywords=True):
            kwargs = {"num_obs_total": self._num_examples, **kwargs}
        elbo, data = super()._objective(key, args, kwargs)
        scale = self._num_examples * elbo.scale
        self._optimizer = optax.chain(optax.scale(scale), self._given_optimizer)
        self._clip = self._given_clip if self._clips_unscaled else self._given_clip / scale
        return elbo, data


class _ObservedAsFixed(Messenger):  # type: ignore[misc]
    """Turns `obs=` of a guide into the value of a latent, which NumPyro itself refuses."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and msg["is_observed"]:
            msg["is_observed"] = False

"""Prior and posterior predictive draws: NumPyro's `Predictive`, without the observations.

NumPyro's class returns an observed site as it was passed, so draws that are meant to be released
can hold private data. Here observed sites are drawn too. It also takes guides of this package.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.infer
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.vi._elbo_terms import GuideModule
from dpoptax.vi.numpyro._batch_handler import BatchHandler


class Predictive(numpyro.infer.Predictive):  # type: ignore[misc]
    """Draws from the prior or posterior predictive distribution, as NumPyro's class does.

    A call is `predictive(key, *args, **kwargs)` with the arguments of the model, and returns draws
    by name of the site. Observations among the arguments are ignored: their sites are drawn.
    All other arguments are used as they are, so pass public ones if the draws are to be released.
    A `numpyro.deterministic` site that is computed from observations returns private values: leave
    the observations out.

    Attributes:
        model: the model.
        num_samples: number of draws.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro
        >>> import numpyro.distributions as dist
        >>> def model(x, y=None):
        ...     slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("data", 200):
        ...         numpyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
        >>> prior = Predictive(model, num_samples=50, data_plate="data")
        >>> draws = prior(jax.random.key(0), jnp.ones(3), jnp.zeros(3))
        >>> draws["slope"].shape, draws["y"].shape
        ((50,), (50, 3))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        posterior_samples: Mapping[str, Array] | None = None,
        *,
        guide: Any = None,
        params: PyTree | None = None,
        num_samples: int | None = None,
        data_plate: str | None = None,
        **options: Any,
    ) -> None:
        """Stores what is drawn from; the arguments are those of NumPyro, and one more.

        Args:
            model: the model.
            posterior_samples: draws of latents, as `result.posterior(...)` returns them. Without
                draws and guide, latents come from the prior.
            guide: a guide of NumPyro, or of `dpoptax.vi.guides` for a dictionary of latents.
            params: parameters of guide and model: `result.params` of `DPSVI`, or what `fit` returns
                for a guide of this package.
            num_samples: number of draws.
            data_plate: name of the plate over the data, if the model gives it a fixed size. It then
                holds as many rows as the arguments.
            **options: as in NumPyro.

        Raises:
            TypeError: a guide of this package without parameters, or whose latents have no names.
            ValueError: as in NumPyro, or an autoguide that has not been trained.
        """
        self._module, self._module_params, self._data_plate = None, params, data_plate
        if guide is not None and _is_module(guide):
            if params is None or num_samples is None:
                raise TypeError(
                    "a guide of dpoptax.vi.guides needs params and num_samples: "
                    "Predictive(model, guide=guide, params=result.params, num_samples=100)."
                )
            self._module, guide, params = guide, None, None
        if isinstance(guide, numpyro.infer.autoguide.AutoGuide) and guide.prototype_trace is None:
            raise ValueError(
                f"this {type(guide).__name__} has not been trained, so it would take observed "
                "sites for latents. Pass the guide that DPSVI or numpyro_elbo has used."
            )
        super().__init__(
            self._unobserved(model),
            None if posterior_samples is None else dict(posterior_samples),
            guide=guide,
            params=params,
            num_samples=num_samples,
            **options,
        )

    def __call__(self, rng_key: PRNGKeyArray, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Returns draws by name of the site, `(num_samples, ...)`.

        Args:
            rng_key: a typed key.
            *args: of the model. Their number of rows may differ from that of the data.
            **kwargs: of the model.
        """
        key = _validate.typed_key("rng_key", rng_key)
        if self._module is not None:
            latents_key, key = jax.random.split(key)
            self.posterior_samples: dict[str, Array] = self._draw(self._module, latents_key)
            self._batch_shape = (self.num_samples,)
        try:
            return super().__call__(key, *args, **kwargs)
        except (TypeError, ValueError) as error:
            if self._data_plate is None and "shapes" in str(error):
                error.add_note(
                    "If the plate over the data has a fixed size, and these are other data, pass "
                    "Predictive(..., data_plate='its name')."
                )
            raise

    def _draw(self, module: GuideModule, key: PRNGKeyArray) -> dict[str, Array]:
        keys = jax.random.split(key, self.num_samples)
        draws = jax.vmap(lambda key: module.apply({"params": self._module_params}, key))(keys)
        if not isinstance(draws, dict):
            raise TypeError(
                f"the latents of the guide are a {type(draws).__name__}; expected a dictionary by "
                "name of the model's sites, such as MeanField({'slope': jnp.zeros(())})."
            )
        return draws

    def _unobserved(self, model: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner = model
            if self._data_plate is not None:
                rows = jnp.arange(_num_rows((args, kwargs)))
                inner = BatchHandler(model, frozenset({self._data_plate}), rows)
            return _Unobserved(inner)(*args, **kwargs)

        return run


class _Unobserved(handlers.uncondition):  # type: ignore[misc]
    """Draws observed sites, but for those that only add a factor to the density."""

    def process_message(self, msg: dict[str, Any]) -> None:
        if msg["type"] == "sample" and not msg["infer"].get("is_auxiliary", False):
            super().process_message(msg)
            msg["infer"].pop("obs", None)


def _is_module(guide: Any) -> bool:
    return type(guide).__module__.startswith("dpoptax.vi.guides") or (
        not isinstance(guide, numpyro.infer.autoguide.AutoGuide) and isinstance(guide, GuideModule)
    )


def _num_rows(arguments: PyTree) -> int:
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if jnp.ndim(leaf) > 0]
    if not leaves:
        raise ValueError(
            "data_plate says that a plate has as many rows as the arguments, but no argument is an "
            "array. Pass one, or leave data_plate out."
        )
    return int(jnp.shape(leaves[0])[0])

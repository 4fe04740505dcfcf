"""State and result of `DPSVI`."""

from typing import Any, NamedTuple, NoReturn

import attrs
import jax
from jaxtyping import Array, PRNGKeyArray

from dpoptax import _validate
from dpoptax._pytree import PyTree
from dpoptax.training import FitResult
from dpoptax.vi._iterates import Convergence
from dpoptax.vi.numpyro import _sites as sites
from dpoptax.vi.numpyro._elbo import NumPyroElbo

_NOT_HERE = {
    "losses": (
        "losses come from the private data, without noise. For your own eyes, run with "
        "nonprivate_losses=True and read result.nonprivate_losses; convergence is public."
    ),
    "state": (
        "the state holds noise keys. To go on with this run pass init_state=result to DPSVI.run."
    ),
}


class SVIState(NamedTuple):
    """What the next update needs. It holds keys, so it must not be released."""

    params: PyTree
    opt_state: Any
    model_key: PRNGKeyArray
    step: Array


@attrs.frozen
class SVIRunResult:
    """The result of `DPSVI.run`.

    Attributes:
        params: values of the `numpyro.param` sites, for `Predictive`: an average over the last
            iterates where that is better, else the last iterate. An average that the optimizer
            keeps by `dpoptax.transforms.average_params` has precedence.
        last_params: the last iterate.
        convergence: whether the iterates have settled, and how many were averaged. Print it.
        fit: plan, ledger and report of the run. Its parameters are the last iterate, on the real
            line.
        elbo: the objective; `elbo.constrain(...)` returns values of the sites.
        root: the key of the run, which must stay secret.
        nonprivate_losses: negative ELBOs of at most 100 batches, if the run was asked for them.
            They come from the data without noise, so they must not be released.
    """

    params: dict[str, PyTree]
    last_params: dict[str, PyTree]
    convergence: Convergence
    fit: FitResult
    elbo: NumPyroElbo = attrs.field(repr=False)
    root: PRNGKeyArray = attrs.field(repr=False)
    nonprivate_losses: Array | None = attrs.field(default=None, repr=False)

    def report(self) -> Any:
        """Returns the privacy report; see `dpoptax.reports.Report`.

        After `init_state=` it includes the run before.
        """
        return self.fit.report()

    def posterior(self, key: PRNGKeyArray, num_samples: int) -> dict[str, Array]:
        """Draws from the guide at `params`: the latents that all examples share.

        Latents of each example are left out, because they depend on its data.

        Args:
            key: a typed key.
            num_samples: number of draws.

        Returns:
            By name of the site, arrays `(num_samples, ...)`, as NumPyro's `Predictive` takes them.

        Raises:
            TypeError: an old-style key.
            ValueError: a number of draws below 1.
        """
        key = _validate.typed_key("key", key)
        count = _validate.count("num_samples", num_samples)
        example = sites.repeat_example(self.elbo.example)
        local = self.elbo.guide_plates

        def draw(key: PRNGKeyArray) -> dict[str, Array]:
            trace = self.elbo.program.guide_trace(self.params, example, key)
            return {
                name: site["value"]
                for name, site in sites.sample_sites(trace)
                if name not in local and not site["infer"].get("is_auxiliary", False)
            }

        return jax.jit(jax.vmap(draw))(jax.random.split(key, count))

    @property
    def optimizer_state(self) -> Any:
        """The state of the optimizer of `DPSVI` after the last step, for post-processing."""
        return self.fit.state.opt_state[1][0]

    def __getattr__(self, name: str) -> NoReturn:
        """Names what takes the place of attributes of NumPyro's result."""
        remedy = f": {_NOT_HERE[name]}" if name in _NOT_HERE else "."
        raise AttributeError(f"the result of DPSVI.run has no attribute {name!r}{remedy}")

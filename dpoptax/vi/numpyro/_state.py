"""State and result of `DPSVI`."""

from typing import Any, NamedTuple

import attrs
from jaxtyping import Array, PRNGKeyArray, PyTree

from dpoptax.training import FitResult


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
        params: values of the `numpyro.param` sites, for `Predictive`.
        fit: plan, ledger and report of the run.
    """

    params: dict[str, PyTree]
    fit: FitResult

    def report(self) -> Any:
        """Returns the privacy report; see `dpoptax.reports.Report`."""
        return self.fit.report()

"""The two visitors of a loss: one finds its sites, the other runs it with a tap at each site."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from dpoptax import _jax_compat
from dpoptax.per_example._primitives import may_spread_nan, run_equation
from dpoptax.per_example._tracing.concatenated import Window, cut, cut_spec
from dpoptax.per_example._tracing.early_sums import run_summed, summed, tap_of
from dpoptax.per_example._tracing.interpreter import LinearUse
from dpoptax.per_example._tracing.site import EqnPath, Site
from dpoptax.per_example._tracing.taps import Saved, Taps


def eqn_path(use: LinearUse) -> EqnPath:
    """Returns the path of the equation of a use, without the number of a concatenated part."""
    return use.path if use.part.window is None else use.path[:-1]


class _PlainRun:
    """Runs linear uses as they are."""

    def run_linear_use(
        self, uses: Sequence[LinearUse], values: Sequence[Any], taps: Taps
    ) -> tuple[list[Any], Saved]:
        """Runs the equation; saves nothing."""
        return run_equation(uses[0].eqn, values), {}


class PlainRunner(_PlainRun):
    """Runs a loss as it is, for losses with equations that JAX cannot run under `vmap`."""

    def linear_use(self, use: LinearUse, operands: tuple[Any, ...]) -> Saved:
        """Saves nothing."""
        return {}

    def fall_back(self, leaf: int, reason: str) -> None:
        """Does nothing: no parameter is tracked."""

    def other_equation(self, eqn: Any) -> None:
        """Does nothing."""

    def zeros_to_save(self, path: EqnPath, depth: int) -> Saved:
        """Returns nothing: nothing is saved."""
        return {}


class SiteFinder(_PlainRun):
    """Collects the sites of a loss, and the leaves that need plain differentiation.

    Attributes:
        sites: by path, those of leaves that fall back included.
        fallback_reasons: by leaf.
    """

    def __init__(self) -> None:
        self.sites: dict[EqnPath, Site] = {}
        self.fallback_reasons: dict[int, str] = {}
        self._spreading_leaves: set[int] = set()
        self._other_equation_spreads = False

    @property
    def may_spread_nan(self) -> bool:
        """Whether `vmap` of the loss may spread NaN from one example to others.

        Sites are no danger: their gradients are not taken under `vmap`.
        """
        spread = self._spreading_leaves & set(self.fallback_reasons)
        return self._other_equation_spreads or bool(spread)

    def linear_use(self, use: LinearUse, operands: tuple[Any, ...]) -> Saved:
        """Adds a site, unless the windows of a concatenated parameter are not known."""
        eqn, part = use.eqn, use.part
        if use.linear.spreads_nan:
            self._spreading_leaves.add(part.leaf)
        saved = [eqn.invars[i].aval for i in use.linear.saved_operands[use.position]]
        # Without a window the whole operands and the whole output belong to the leaf.
        operand_windows: tuple[Window, ...] = (None,) * len(saved)
        output_window: Window = None
        if part.window is not None and not use.linear.sums_early:
            if use.linear.windows is None:
                name = eqn.primitive.name
                self.fall_back(part.leaf, f"concatenated and used by {name} at {use.source}")
                return {}
            operand_windows, output_window = use.linear.windows(eqn, use.position, part.window)
        output = eqn.outvars[0].aval
        site = Site(
            path=use.path,
            leaf=part.leaf,
            steps=part.steps,
            scans=part.scans,
            primitive=eqn.primitive,
            params=eqn.params,
            position=use.position,
            parameter=cut_spec(use.parameter, part.window),
            operands=tuple(map(cut_spec, saved, operand_windows)),
            operand_windows=operand_windows,
            output=cut_spec(output, output_window),
            output_window=output_window,
            tap=use.tap,
            # The additions up to the tap keep the shape and dtype.
            tap_output=cut_spec(output, None),
            in_cond=use.in_cond,
            in_checkpoint=use.in_checkpoint,
            source=use.source,
        )
        if use.linear.sums_early:
            site = summed(site, use.parameter, part.window, eqn_path(use))
        self.sites[use.path] = site
        return {}

    def fall_back(self, leaf: int, reason: str) -> None:
        """Notes the first reason of a leaf."""
        self.fallback_reasons.setdefault(leaf, reason)

    def other_equation(self, eqn: Any) -> None:
        """Notes whether `vmap` of the equation may spread NaN."""
        equations = (eqn, *_jax_compat.equations_inside(eqn))
        self._other_equation_spreads = self._other_equation_spreads or may_spread_nan(equations)

    def zeros_to_save(self, path: EqnPath, depth: int) -> Saved:
        """Returns nothing: nothing is saved."""
        return {}


class TapRunner(_PlainRun):
    """Saves the operands of sites that were found before."""

    def __init__(self, sites: tuple[Site, ...], fallback_reasons: dict[int, str]) -> None:
        self._sites = {site.path: site for site in sites}
        self._fallback_reasons = fallback_reasons

    def linear_use(self, use: LinearUse, operands: tuple[Any, ...]) -> Saved:
        """Saves the operands, or their windows, if the use is a site."""
        if (site := self._sites.get(use.path)) is None:
            return {}
        if site.before_sum is not None:
            return {use.path: ()}
        return {use.path: tuple(map(cut, operands, site.operand_windows))}

    def run_linear_use(
        self, uses: Sequence[LinearUse], values: Sequence[Any], taps: Taps
    ) -> tuple[list[Any], Saved]:
        """Runs the equation; one that sums early has its own tap."""
        use = uses[0]
        zeros = taps.get(tap_of(eqn_path(use)))
        if zeros is None or not use.linear.sums_early:
            return super().run_linear_use(uses, values, taps)
        return [run_summed(use.eqn, use.position, values, zeros)], {}

    def fall_back(self, leaf: int, reason: str) -> None:
        """Refuses a use that the site finder did not see: its gradient would be lost."""
        # Such a gradient would be too small without notice: stop rather than release it.
        if leaf not in self._fallback_reasons:
            raise AssertionError(f"leaf {leaf} has a use that tracing did not see: {reason}")

    def other_equation(self, eqn: Any) -> None:
        """Does nothing."""

    def zeros_to_save(self, path: EqnPath, depth: int) -> Saved:
        """Returns zeros in the shape of what the sites under a path save."""
        return {
            site.path: tuple(
                jnp.zeros((*(scan.length for scan in site.scans[depth:]), *spec.shape), spec.dtype)
                for spec in site.operands
            )
            for site in self._sites.values()
            if site.path[: len(path)] == path
        }

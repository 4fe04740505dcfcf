"""The numbers of a privacy report."""

from typing import Any

import attrs

from dpoptax.accounting._epsilon import PrivacyLoss
from dpoptax.reports._attack import AttackSummary
from dpoptax.schedules import ScalarOrSchedule


@attrs.frozen(kw_only=True)
class ReportValues:
    """The fields of `Report`, which documents them. `_text` reads them without importing it."""

    unit: str
    relation: str
    num_units: int
    released: str
    sampler: dict[str, Any]
    clip: dict[str, Any]
    mechanism: dict[str, Any]
    correlation: dict[str, Any] | None
    noise_multiplier: ScalarOrSchedule
    gradient_noise_multiplier: ScalarOrSchedule | None
    steps_planned: int
    steps_done: int
    steps_lost: int
    covers_all_steps: bool
    delta: float
    epsilon: float
    epsilon_of_steps_done: float
    epsilon_of_one_run: float
    runs: dict[str, Any] | None
    epsilon_by_delta: dict[float, float]
    epsilon_replace_one: float
    epsilon_by_group_size: dict[int, float]
    epsilon_unamplified: float
    advantage: float
    true_positive_rate: dict[float, float]
    posterior_belief: dict[float, float]
    reconstruction: dict[float, float]
    mu: float
    accountant: str
    prng: str
    assumptions: tuple[str, ...]
    loss: PrivacyLoss = attrs.field(repr=False, eq=False)
    attack: AttackSummary | None = None
    noisy_num_units: bool = False
    attack_rates: Any = attrs.field(default=None, repr=False, eq=False)

"""The check that data and sampler belong together: one row of the data per unit of privacy."""

from dpoptax.samplers import Sampler, UserExamplesPoisson, UserPoisson


def check_size(length: int, sampler: Sampler, num_canaries: int = 0) -> None:
    """Raises unless the data have one row per unit that the sampler draws and the plan accounts.

    Canaries of an audit count too: `length` is the number of rows without them.
    """
    expected, unit = sampler.num_examples, sampler.unit
    if length + num_canaries == expected:
        return
    if num_canaries:
        total = length + num_canaries
        raise ValueError(
            f"the plan is for {expected:,} examples; got {length:,} rows and {num_canaries:,} "
            "canaries. Canaries are additional examples, so their guarantee must come from the "
            f"same plan. Plan for num_examples={total}: {total:,} = {length:,} rows + "
            f"{num_canaries:,} canaries."
        )
    if unit == "example":
        raise ValueError(
            f"the plan is for {expected} examples and data has {length}: its epsilon would not be "
            f"this run's. Plan for this data: pass a sampler with num_examples={length}. If one "
            "person may have several rows, plan for persons: samplers.UserPoisson. If the plan "
            "counts the canaries of an audit, pass audit=."
        )
    if isinstance(sampler, UserExamplesPoisson):
        raise ValueError(
            f"the plan is for the {expected} examples that users may contribute; got data of "
            f"{length} rows. Call fit(..., sampler.arrange(data)), which leaves the others out."
        )
    # Another sampler for these rows would run, and protect single rows in place of users.
    remedy = f"Make one row per {unit} of them."
    if isinstance(sampler, UserPoisson):
        remedy = "Call fit(..., sampler.arrange(data)), which makes one row per user."
    raise ValueError(
        f"the plan is for {expected} {unit}s, so data must have one row per {unit}; got {length} "
        f"rows. {remedy} Keep the sampler: one that draws rows protects single rows, not {unit}s."
    )

"""What left the program, in the words of a report."""

RELEASED = "every noisy gradient, and so all intermediate parameters and the final ones"
RELEASED_WITH_COUNTS = (
    "every noisy gradient, every noisy count that sets the clip bound, and so all intermediate "
    "parameters and the final ones"
)


def released(has_counts: bool, num_others: int) -> str:
    """What left the program."""
    others = ""
    if num_others:
        others = (
            f". Every number here also covers {num_others:,} other "
            f"release{'s' if num_others > 1 else ''} on the same data"
        )
    return (RELEASED_WITH_COUNTS if has_counts else RELEASED) + others

"""Rounding of privacy numbers: always up, so that no report promises too much."""

import decimal
import math


def round_up(value: float, digits: int = 3) -> str:
    """Writes a number with a fixed number of decimals, rounded up.

    Args:
        value: an epsilon, for example.
        digits: the number of decimals.

    Returns:
        The decimal number, or "inf".

    Example:
        >>> round_up(0.5351)
        '0.536'
    """
    if not math.isfinite(value):
        return "inf"
    # The shortest decimal that reads back as this float, so that 0.535 stays 0.535.
    written = decimal.Decimal(repr(float(value)))
    return str(written.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_CEILING))


def round_up_significant(value: float, digits: int = 3) -> str:
    """Writes a number with this many significant digits, rounded up."""
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(repr(value))):.{digits}g}"


def round_down(value: float, digits: int = 3) -> str:
    """Writes a lower bound with a fixed number of decimals, rounded down."""
    if not math.isfinite(value):
        return "inf"
    written = decimal.Decimal(repr(float(value)))
    return str(written.quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_FLOOR))

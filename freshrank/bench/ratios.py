"""What one system measures against another, formed within each round: machines and hours differ, rounds do not."""

from collections.abc import Sequence
from statistics import median

from pydantic import BaseModel


class Ratio(BaseModel):
    """Taken within each round, then the median over rounds and the range."""

    name: str
    value: float
    lowest: float
    highest: float
    target: str
    met: bool | None


def ratio(
    name: str,
    upper: Sequence[float],
    lower: Sequence[float],
    at_most: float | None = None,
    at_least: float | None = None,
) -> Ratio:
    """``upper`` by ``lower``, one of each per round; without a bound nothing is held against it."""
    values = [a / b for a, b in zip(upper, lower, strict=True)]
    value = median(values)
    if at_most is not None:
        target, met = f"at most {at_most:g}", value <= at_most
    elif at_least is not None:
        target, met = f"at least {at_least:g}", value >= at_least
    else:
        target, met = "", None
    return Ratio(name=name, value=value, lowest=min(values), highest=max(values), target=target, met=met)

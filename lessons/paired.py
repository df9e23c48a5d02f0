"""Does a difference between two methods mean anything? Paired by seed, with a 95% interval.

Two runs with the same seed see the same records in the same order, so what the seed does to both
falls out of their difference. With n seeds the differences d have a mean and a standard deviation,
and Student's t says how far off the mean may be: mean ± t · sd / √n, with t for n - 1 degrees of
freedom. Where that interval holds 0, the difference is not shown: more seeds might show it.

The interval speaks of the seed of fine-tuning alone. Another pretraining, other questions or
another world could move the difference by more.
"""

import math
from dataclasses import dataclass
from statistics import mean, stdev

# 97.5% points of Student's t for 1 to 10 degrees of freedom, from any table of it
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
MOST = 1000  # seeds: beyond that, "more than"


def t975(freedom: int) -> float:
    """Above 10 the first terms of the expansion about the normal's 1.960, good to 0.003."""
    if freedom <= len(T975):
        return T975[freedom - 1]
    z = 1.960
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


@dataclass(frozen=True)
class Difference:
    values: tuple[float, ...]  # one for each seed that both have

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def half(self) -> float:
        """Half the width of the 95% interval; infinite for a single seed, which has no spread."""
        n = len(self.values)
        return t975(n - 1) * stdev(self.values) / math.sqrt(n) if n > 1 else math.inf

    @property
    def verdict(self) -> str:
        """ "more" or "less" where the interval lies on one side of 0, else "not shown"."""
        if not self.values:
            return "not run yet"
        if abs(self.mean) <= self.half:
            return "not shown"
        return "more" if self.mean > 0 else "less"

    @property
    def needed(self) -> str:
        """With how many seeds an interval about this mean, at this spread, would leave 0 out."""
        if len(self.values) < 2:
            return "–"
        spread = stdev(self.values)
        for n in range(2, MOST + 1):
            if t975(n - 1) * spread / math.sqrt(n) < abs(self.mean):
                return str(n)
        return f"over {MOST}"

    def __str__(self) -> str:
        return self.with_digits(1)

    def with_digits(self, n: int) -> str:
        if not self.values:
            return "–"
        if math.isinf(self.half):
            return f"{self.mean:+.{n}f} (one seed, no interval)"
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.{n}f} [{low:+.{n}f}, {high:+.{n}f}]"


def difference(one: dict[int, float], two: dict[int, float]) -> Difference:
    """{seed: value} minus {seed: value}, over the seeds that both have."""
    return Difference(tuple(one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())))

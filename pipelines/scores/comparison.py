"""Two models' answers to the same questions: how far apart they are, and whether that can be chance."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.scores.metrics import Array, Groups, Points, Score, by_group, points_of, resampled_sums, say, value_of

SWAPS = 5000
SIGNIFICANT = 0.05
FEWEST_GROUPS = 30
"""Of rows about the same documents. Fewer do not show that a model is as good: their interval is too narrow, and a
large difference may be chance."""


@dataclass(frozen=True)
class Difference:
    """A metric of a new model less that of an old one, with a 95 % interval; `n` rows of `groups` had a say in it.

    `p` is how often a difference as large as this would be chance if the models were equally good; None where only
    the intervals of the two are known.
    """

    new: float
    old: float
    difference: float
    low: float
    high: float
    p: float | None
    n: int
    groups: int

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies below 0, and the test agrees: of few rows the interval is too narrow."""
        return self.high < 0 and (self.p is None or self.p < SIGNIFICANT)


def compare(new: Sequence[Points], old: Sequence[Points], groups: Groups = None) -> dict[str, Difference]:
    """Each metric that both have, on rows in the same order: new[i] and old[i] score answers to one question.

    The interval is that of the paired bootstrap (Koehn 2004); p is that of a paired permutation test, also called
    approximate randomisation (Riezler and Maxwell 2005): two answers change sides by the toss of a coin. Those to
    questions of one group are drawn, and change sides, together (arXiv:2411.00640).
    """
    of_new, of_old = points_of(new), points_of(old)
    names = [name for name in of_new if name in of_old]
    ours, theirs = ([by_group(of[name], groups) for name in names] for of in (of_new, of_old))
    drawn, swapped = resampled_sums([*ours, *theirs]), _swapped_sums(ours, theirs)
    differences = {}
    for index, name in enumerate(names):
        value, earlier = float(value_of(name, ours[index].sum(0))), float(value_of(name, theirs[index].sum(0)))
        low, high = np.nanquantile(_apart(name, drawn, index), (0.025, 0.975))
        # Sums in another order differ in their last digits.
        as_large = np.abs(_apart(name, swapped, index)) >= abs(value - earlier) - 1e-12
        p = float(1 + np.count_nonzero(as_large)) / (1 + SWAPS)
        said = say(of_new[name] + of_old[name], groups)
        differences[name] = Difference(value, earlier, value - earlier, float(low), float(high), p, *said)
    return differences


def compare_scores(new: Score, old: Score) -> Difference:
    """The difference of two scores whose rows are not known, its interval from theirs (MOVER, Zou and Donner 2008).

    If they are of the same rows it is wider than it need be.
    """
    below = np.hypot(new.value - new.low, old.high - old.value)
    above = np.hypot(new.high - new.value, old.value - old.low)
    difference = new.value - old.value
    low, high = float(difference - below), float(difference + above)
    groups = min(score.n if score.groups is None else score.groups for score in (new, old))
    return Difference(new.value, old.value, difference, low, high, None, min(new.n, old.n), groups)


def _apart(metric: str, sums: list[Array], index: int) -> Array:
    """How far the new model's metric is above the old one's, in each sample; `sums` has all of the new one's first."""
    return value_of(metric, sums[index]) - value_of(metric, sums[index + len(sums) // 2])


def _swapped_sums(new: list[Array], old: list[Array]) -> list[Array]:
    """Column sums of each table of `new` and then of `old`, [SWAPS, numbers], after random rows changed sides."""
    if not new:
        return []
    ours, theirs = np.hstack(new), np.hstack(old)
    random = np.random.default_rng(0)
    apart = (theirs - ours)[(theirs != ours).any(1)]  # what earned the same may change sides unseen
    moved = np.array([random.integers(0, 2, len(apart)).astype(float) @ apart for _ in range(SWAPS)])
    widths = np.cumsum([table.shape[1] for table in new])[:-1]
    return [*np.split(ours.sum(0) + moved, widths, axis=1), *np.split(theirs.sum(0) - moved, widths, axis=1)]

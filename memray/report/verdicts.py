"""Whether the data of a study support a claim or contradict it, or leave it undecided.

The rule. The unit is the string, or the sequence of strings. The effect is that of the last level on the first (or of a
single cell on itself), with the 95 % interval of `effects`: of two levels Hodges and Lehmann's shift, of logarithms
where a claim is relative, with replicates that were never reached as the latest; of one cell the mean. Where levels
were followed for different numbers of epochs, what lies beyond the shortest horizon counts as never reached in all of
them. The p-value of an effect is the smallest alpha at which the 1 - alpha interval lies beyond the smallest effect of
interest, so that Holm's adjustment over the table takes each interval at its own level. Where a claim is that something
moves with an ordered factor, and this has more than two levels, Jonckheere and Terpstra's test over all of them must
show the same direction: the larger p-value counts. A row is *supported* where the adjusted p-value on the claimed side
is at most 0.05, *contradicted* where that on the other side is, else *undecided*, as is every row with fewer than five
replicates a level, which takes no part in Holm's adjustment. Of the replicates that would decide it, the table says how
many more than chance would need at a power of 80 %, if the effect stayed what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from memray.measures.statistics import Interval, holm, jonckheere_terpstra
from memray.report.claims import CLAIMS, Claim, Subject
from memray.report.effects import Effect, Mean, Shift
from memray.report.estimands import Evidence
from memray.report.placements import varies_placement
from memray.report.records import RecordsOf
from memray.report.replicates import seen_cells
from memray.spec import TrialSpec
from memray.sweep import Sweep

LEVEL = 0.95
ALPHA = 1 - LEVEL
ENOUGH_REPLICATES = 5
PERMUTATIONS = 9_999

Judgement = Literal["supported", "contradicted", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim as one place of a study judges it.

    Attributes:
        claim: What is judged.
        evidence: On what.
        estimate: The effect in the claim's unit; nan where the data do not say.
        interval: Of 95 %; infinite where the data do not bound it.
        p_values: Of being supported and of being contradicted; nan with too few replicates.
        adjusted: The smaller of the two after Holm's adjustment over the table.
        trend_p_value: Of Jonckheere and Terpstra's test over all levels, two-sided; nan where it was not asked.
        num_replicates: The fewest and the most of a level.
        verdict: By the rule at the head of this module.
        deciding: Replicates a level that would decide it; infinite where more than a thousand would, nan where no
            number would, or it is decided.
    """

    claim: Claim
    evidence: Evidence
    estimate: float
    interval: Interval
    p_values: tuple[float, float]
    adjusted: float
    trend_p_value: float
    num_replicates: tuple[int, int]
    verdict: Judgement
    deciding: float


def claims_of(sweep: Sweep) -> tuple[Claim, ...]:
    """The claims that a sweep was made to judge."""
    return tuple(claim for claim in CLAIMS if sweep.name in claim.studies)


def _subject(spec: TrialSpec) -> Subject:
    if spec.corpus is not None:
        return "corpora"
    return "strings" if spec.curriculum is None else "sequences"


def judge(sweep: Sweep, frame: pd.DataFrame, records: RecordsOf | None = None) -> list[Finding]:
    """The claims table of a sweep: a row for each claim and place where it can be judged.

    A sweep that was made for no claim judges those about the fields that it moves.

    Args:
        records: Of each trial; without them there is no evidence of what results do not hold.
    """
    # Where placement varies, a trial is compared with itself.
    cells = [] if varies_placement(sweep) else seen_cells(sweep, frame, records)
    claims = claims_of(sweep)
    found = [
        _look(claim, evidence)
        for claim in claims or CLAIMS
        for evidence in claim.estimand([cell for cell in cells if _subject(cell.spec) == claim.about])
        if claims or len(evidence.levels) > 1
    ]
    adjusted = holm(np.array([min(each.p_values) for each in found], dtype=np.float64))
    num_tests = int(np.sum(~np.isnan(adjusted)))
    return [_decide(each, float(p_value), num_tests) for each, p_value in zip(found, adjusted, strict=True)]


def _look(claim: Claim, evidence: Evidence) -> Finding:
    """What the evidence says by itself."""
    effect = _effect(claim, evidence)
    sizes = [len(values) for values in evidence.values]
    trend_p_value, direction = _trend(evidence)
    finding = Finding(
        claim=claim,
        evidence=evidence,
        estimate=_in_unit(claim, effect.estimate),
        interval=Interval(*(_in_unit(claim, end) for end in effect.interval(LEVEL))),
        p_values=(math.nan, math.nan),
        adjusted=math.nan,
        trend_p_value=trend_p_value,
        num_replicates=(min(sizes), max(sizes)),
        verdict="undecided",
        deciding=math.nan,
    )
    if min(sizes) < ENOUGH_REPLICATES:
        return finding
    return replace(finding, p_values=_p_values(claim, effect, trend_p_value, direction))


def _effect(claim: Claim, evidence: Evidence) -> Effect:
    with np.errstate(divide="ignore"):
        values = [np.log(each) if claim.is_relative else each for each in evidence.values]
    return Mean(values[0]) if len(values) == 1 else Shift(values[0], values[-1])


def _trend(evidence: Evidence) -> tuple[float, int]:
    """The two-sided p-value of a trend over more than two levels, and its sign; nan and 0 where there are no more."""
    if len(evidence.values) < 3:
        return math.nan, 0
    groups = [np.where(np.isinf(values), np.nan, values) for values in evidence.values]
    sizes = np.array([len(group) for group in groups])
    test = jonckheere_terpstra(groups, alternative="two-sided", rng=np.random.default_rng(0), permutations=PERMUTATIONS)
    return test.p_value, int(np.sign(test.statistic - (sizes.sum() ** 2 - (sizes**2).sum()) / 4))


def _p_values(claim: Claim, effect: Effect, trend_p_value: float, trend: int) -> tuple[float, float]:
    """Of being supported and of being contradicted."""
    low, high = claim.bounds

    def along(p_value: float, sign: int) -> float:
        """With the trend over all levels, which must have the same sign."""
        return p_value if math.isnan(trend_p_value) else max(p_value, trend_p_value if trend == sign else 1.0)

    rises, falls = along(effect.p_above(high), 1), along(effect.p_below(low), -1)
    inside = max(effect.p_above(low), effect.p_below(high))
    outside = min(effect.p_above(high), effect.p_below(low))
    match claim.direction:
        case "rises":
            return rises, falls
        case "falls":
            return falls, rises
        case "stays":
            return inside, outside
        case "moves":
            return outside, inside
        case "does not rise":
            return effect.p_below(high), rises


def _decide(finding: Finding, adjusted: float, num_tests: int) -> Finding:
    """The verdict, once the whole table is known."""
    supported, contradicted = finding.p_values
    if adjusted <= ALPHA:
        verdict: Judgement = "supported" if supported <= contradicted else "contradicted"
        return replace(finding, adjusted=adjusted, verdict=verdict)
    deciding = _deciding(finding.claim, _effect(finding.claim, finding.evidence), ALPHA / max(1, num_tests))
    # Chance may have kept undecided what so many were likely to decide; with too few, nothing is.
    least = ENOUGH_REPLICATES if math.isnan(adjusted) else finding.num_replicates[0] + 1
    if math.isnan(adjusted) and math.isnan(deciding):
        deciding = least
    return replace(finding, adjusted=adjusted, deciding=float(np.maximum(deciding, least)))


def _deciding(claim: Claim, effect: Effect, alpha: float) -> float:
    """Replicates a level that would decide a claim in either way, were the effect what it seems.

    Infinite where more than a thousand would, nan where no number would.
    """
    low, high = claim.bounds
    above, below = effect.seeds_above(high, alpha), effect.seeds_below(low, alpha)
    match claim.direction:
        case "rises" | "falls":
            ways = [above, below]
        case "stays" | "moves":
            inside = np.maximum(effect.seeds_above(low, alpha), effect.seeds_below(high, alpha))
            ways = [above, below, inside]
        case "does not rise":
            ways = [above, effect.seeds_below(high, alpha)]
    return float(np.fmin.reduce(ways))


def _in_unit(claim: Claim, effect: float) -> float:
    return math.expm1(effect) if claim.is_relative else effect

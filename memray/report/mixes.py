"""The samples that two mixes of a corpus share, compared one by one: what foreign samples do to the others.

A mix is the overlap with more samples trained beside it, foreign ones or as many native ones. Of each sample of the
overlap there is one match length a training, at the last probe epoch at which fewer than half are recited whole in
every training of either mix: where all are, nothing can differ. How much two mixes differ is held against how much
trainings of the same mix do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from memray.corpora import CorpusSpec
from memray.measures.paired import PairedComparison, paired_comparison
from memray.report import column
from memray.report.replicates import Seen, groups
from memray.report.samples_seen import HALF_WHOLE, SamplesSeen

# The fields in which mixes of one overlap differ.
MIX = ("corpus.num_samples", "corpus.foreign.", "corpus.num_foreign")
# Fewer trainings of a mix say little of what another training of it would have given.
TRAININGS_WANTED = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlap:
    """The native samples that both mixes of one string seed train.

    Attributes:
        string_seed: What drew them.
        rows: Where each stands in its source.
        foreign: How many tokens of each are recited, training by training, where foreign samples were added.
        native: The same where as many native ones were.
    """

    string_seed: int
    rows: Int[ndarray, " samples"]
    foreign: Int[ndarray, "foreign_trainings samples"]
    native: Int[ndarray, "native_trainings samples"]

    @property
    def num_trainings(self) -> int:
        """Trainings of the mix that has fewer."""
        return min(len(self.foreign), len(self.native))

    @property
    def means(self) -> tuple[Float[ndarray, " samples"], Float[ndarray, " samples"]]:
        """Mean match length of each sample over the trainings with foreign ones, and with native ones."""
        return self.foreign.mean(axis=0), self.native.mean(axis=0)

    @cached_property
    def between(self) -> PairedComparison:
        """The mix with foreign samples against the one with native ones; above 0 where they are recited for longer."""
        return paired_comparison(*self.means, rng=None)

    @cached_property
    def within(self) -> list[PairedComparison]:
        """The same test between two halves of the trainings of one mix, for all ways to halve them.

        The halves are equally large, of an odd number one training is left out: the mean of more trainings is less
        skewed, and the test would find that. They are smaller than what `between` compares, and share no seeds as its
        two sides do, and so differ by more.
        """
        return [
            paired_comparison(one.mean(axis=0), other.mean(axis=0), rng=None)
            for mix in (self.foreign, self.native)
            for one, other in _halves(mix)
        ]


def _halves(mix: Int[ndarray, "trainings samples"]) -> Iterator[tuple[ndarray, ndarray]]:
    everyone = range(len(mix))
    for one in combinations(everyone, len(mix) // 2) if len(mix) > 1 else ():
        left = [each for each in everyone if each not in one]
        for other in combinations(left, len(one)):
            if one < other:  # each pair once
                yield mix[[*one]], mix[[*other]]


def mixes(cells: Sequence[Seen]) -> list[tuple[Seen, Seen]]:
    """The pairs of cells that share everything but the mix: with foreign samples, and with native ones in their place.

    Together both train equally many.
    """

    def corpus(cell: Seen) -> CorpusSpec:
        assert cell.spec.corpus is not None
        return cell.spec.corpus

    found = []
    for group in groups([cell for cell in cells if cell.spec.corpus is not None], lambda cell: cell.held(MIX)):
        for foreign in (cell for cell in group if corpus(cell).num_foreign):
            found += [
                (foreign, native)
                for native in group
                if not corpus(native).num_foreign and corpus(native).num_samples == corpus(foreign).num_together
            ]
    return found


def overlaps(foreign: Seen, native: Seen) -> list[Overlap]:
    """What two mixes share, by string seed; nothing of those that are not trained in both, or without records."""
    epochs = set.intersection(*(_partly_recited(rows) for cell in (foreign, native) for _, rows in cell.rows))
    if not epochs:
        return []
    by_seed = [_match_lengths(cell, max(epochs)) for cell in (foreign, native)]
    found = []
    for seed in sorted(by_seed[0].keys() & by_seed[1].keys()):
        of_foreign, of_native = (each[seed] for each in by_seed)
        trainings = [*of_foreign, *of_native]
        rows = [row for row in trainings[0] if all(row in each for each in trainings)]
        if rows:
            lengths = [np.array([[each[row] for row in rows] for each in own]) for own in (of_foreign, of_native)]
            found.append(Overlap(string_seed=seed, rows=np.array(rows), foreign=lengths[0], native=lengths[1]))
    return found


def _partly_recited(rows: pd.DataFrame) -> set[int]:
    """The epochs of training at which fewer than half of a trial's samples are recited whole."""
    epoch = column(rows, "epoch")
    return {int(each) for each in epoch[(epoch > 0) & (column(rows, "match/censored") < HALF_WHOLE)]}


def _match_lengths(cell: Seen, epoch: int) -> dict[int, list[dict[int, int]]]:
    """By string seed, of each training: the match lengths of the samples that are compared, by their row."""
    found: dict[int, list[dict[int, int]]] = {}
    if (records := cell.records) is None:
        return found
    for trial, _ in cell.rows:
        samples = records(trial.trial_id()).samples()
        if not samples.num_columns:
            continue
        seen = SamplesSeen.at(trial, samples, epoch)
        compared = trial.probes.compared_strings or seen.correctness.num_samples
        places = zip(seen.table["sample"].to_pylist(), seen.table["row"].to_pylist(), strict=True)
        lengths = zip(places, seen.correctness.num_match.tolist(), strict=True)
        own = {row: num_match for (sample, row), num_match in lengths if sample < compared}
        found.setdefault(trial.string_seed, []).append(own)
    return found


def control(found: Sequence[Overlap]) -> str:
    """What trainings of one mix differ by, and how sure the comparison between mixes is, for people."""
    p_value = float(np.median([each.between.p_value for each in found]))
    sentence = f"between mixes p = {p_value:.2g} (median over string seeds)"
    within = [each for overlap in found for each in overlap.within]
    if within:
        size = float(np.median([abs(each.effect) for each in within]))
        chance = float(np.median([each.p_value for each in within]))
        sentence += f"; between trainings of one mix the effect is ±{size:.2f}, p = {chance:.2g} (medians)"
    return sentence

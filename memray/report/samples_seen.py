"""The samples of a corpus as one trial has shown them at one of its probe epochs, and which epoch to take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from memray.measures.match_length import Correctness
from memray.sample_measurement import ScoredSamples
from memray.samples import NATIVE
from memray.spec import TrialSpec

# Up to this share of samples that are recited to the end of their references, match lengths have a tail: where many
# are, the longest references are the longest matches.
FEW_WHOLE = 0.05
# Where fewer than this share are, right and wrong tokens are there to depend on each other, and samples to differ.
HALF_WHOLE = 0.5


@dataclass(frozen=True)
class SamplesSeen:
    """The native samples of one trial at one of its probe epochs.

    Attributes:
        table: A row a sample.
        correctness: Which tokens of their references are right, in the same order.
    """

    trial: TrialSpec
    table: pa.Table
    correctness: Correctness

    @staticmethod
    def last(trial: TrialSpec, samples: pa.Table) -> SamplesSeen:
        """At the last epoch."""
        return SamplesSeen.at(trial, samples, int(samples["epoch"].to_numpy().max()))

    @staticmethod
    def few_whole(trial: TrialSpec, samples: pa.Table) -> SamplesSeen | None:
        """At the last epoch of training before more than a few of those that are compared are recited whole.

        At the last epoch, where more are from the first look on.
        """
        if not samples.num_columns:
            return None
        found = None
        for epoch in sorted({*samples["epoch"].to_pylist()} - {0}):
            seen = SamplesSeen.at(trial, samples, epoch)
            compared = seen.correctness.is_censored[: trial.probes.compared_strings or None]
            if np.mean(compared) > FEW_WHOLE:
                break
            found = seen
        return found or SamplesSeen.last(trial, samples)

    @staticmethod
    def at(trial: TrialSpec, samples: pa.Table, epoch: int) -> SamplesSeen:
        """At one of the epochs that its records have."""
        table = samples.filter(pa.array(samples["epoch"].to_numpy() == epoch))
        (scored,) = ScoredSamples.read(table)
        native = scored.role == NATIVE
        return SamplesSeen(trial, table.filter(pa.array(native)), scored.reference(native)[0])

"""What a curriculum showed: from the recall of every string at every look to the measurement of each stage.

The recall matrix is a table, one row a string and a look at it, in order of time. It is read once from its beginning to
its end, live or from the ledger's records, so that both give the same numbers to the last bit; what is remembered on
the way does not grow with the rows. This module knows no model.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from memray.curriculum import BEFORE, Stage
from memray.measurement import KnownString, Measurement, mean, over_strings
from memray.measures.phases import string_phases
from memray.measures.recall import LN2, heldout_floor, measure_strings, robust
from memray.measures.retention import RetentionCounts, fit_retention, retention_measures
from memray.scoring import TokenScores
from memray.spec import TrialSpec

# What is kept of each string at each look, beside where it stands in the sequence.
KEPT = (
    "recall/token_accuracy", "recall/nll_nats", "recall/memorised_bits", "recall/mixture_bits",
    "recall/mixture_bits_se", "recall/uncorrected", "guessing/alphabet_mass", "guessing/kl_own_bits",
    "health/tie_rate",
)  # fmt: skip
BASE, OTHER = 0, 1
# Guessing may not be right everywhere: then nothing could be forgotten.
FLOOR_AT_MOST = 0.999

Block = dict[str, ndarray]


class Place(NamedTuple):
    """Where a sequence stands.

    Attributes:
        stage: Its number, or `BEFORE`.
        epoch: Epochs trained so far, in all stages.
        stage_epoch: Epochs of them in this stage.
        step: Optimiser steps so far.
        is_end: Whether it is the end of the stage.
    """

    stage: int
    epoch: int
    stage_epoch: int
    step: int
    is_end: bool

    def block(self, parts: Sequence[Block], *, is_own: bool) -> Block:
        """What one look showed, as rows of the matrix."""
        number = sum(len(part["string"]) for part in parts)
        types = {"stage": np.int32, "epoch": np.int32, "stage_epoch": np.int32, "step": np.int64, "is_end": np.bool_}
        rows = {name: np.full(number, getattr(self, name), dtype=kind) for name, kind in types.items()}
        rows["is_own"] = np.full(number, is_own)
        return rows | {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def recalled(
    scores: TokenScores, known: Sequence[KnownString], ids: Sequence[int], *, source: int, is_held_out: bool
) -> Block:
    """The recall of some strings of one source under some weights."""
    measured = measure_strings(scores, [string.truth for string in known])
    return {
        "string": np.array(ids, dtype=np.int32),
        "is_held_out": np.full(len(ids), is_held_out),
        "source": np.full(len(ids), source, dtype=np.int8),
        **{key: measured[key] for key in KEPT},
    }


@dataclass
class Learned:
    """What is remembered of the strings: when each was last trained, and how well it was recalled then.

    Attributes:
        stage: The last stage that trained it; `BEFORE` if none has.
        step: The optimiser steps at the end of that.
        recall: Robust recall there; nan if none has.
    """

    stage: Int[ndarray, " strings"]
    step: Int[ndarray, " strings"]
    recall: Float[ndarray, " strings"]

    @classmethod
    def none_of(cls, num_strings: int) -> "Learned":
        never = np.full(num_strings, BEFORE, dtype=np.int64)
        return cls(never, never.copy(), np.full(num_strings, math.nan))


@dataclass
class SequenceMeasurer:
    """Measures a curriculum, look after look and stage after stage."""

    spec: TrialSpec
    known: Mapping[int, Sequence[KnownString]]
    stages: tuple[Stage, ...] = ()
    trial_id: str = ""
    learned: Learned = field(default_factory=lambda: Learned.none_of(0))
    floors: dict[int, float] = field(default_factory=dict)
    base_floors: dict[int, float] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    forgetting: "Forgetting" = field(default_factory=lambda: Forgetting(0))

    def __post_init__(self) -> None:
        self.stages = self.spec.stages()
        self.trial_id = self.spec.trial_id()
        self.learned = Learned.none_of(self.spec.strings.num_strings)
        self.forgetting = Forgetting(self.spec.num_targets)

    def add(self, block: Block) -> None:
        """Takes in one look; looks come in order of time."""
        for source in np.unique(block["source"]):
            held_out = block["is_held_out"] & (block["source"] == source)
            if held_out.any():
                seen = np.array([self.floors.get(int(source), 0.0), block["recall/uncorrected"][held_out].mean()])
                self.floors[int(source)] = heldout_floor(seen)
        floors = [self.floors.get(int(source), 0.0) for source in block["source"]]
        uncorrected = block["recall/uncorrected"]
        is_ours = ~block["is_held_out"]
        self.blocks.append(
            block
            | {
                "learned_stage": np.where(is_ours, self.learned.stage[block["string"] * is_ours], BEFORE),
                "learned_step": np.where(is_ours, self.learned.step[block["string"] * is_ours], BEFORE),
                "recall/robust": np.array([robust(*pair) for pair in zip(uncorrected, floors, strict=True)]),
            }
        )

    def close(self, stage: int, epoch: int) -> Measurement:
        """The measurement of a stage, once all looks at it are taken in."""
        rows = _joined(self.blocks)
        self.blocks = []
        metrics = _looked(rows, self.learned, self.spec)
        strings: tuple[dict[str, Any], ...] = ()
        if stage == BEFORE:
            facts = [string.facts for string in self.known[BASE]]
            metrics |= {key: mean(each[key] for each in facts) for key in facts[0]}
        elif not self.stages[stage].is_unrepeated:
            strings = self._own(self.stages[stage], rows)
            metrics |= _own_metrics(strings) | self._transfer(rows)
            self._remember(self.stages[stage], rows)
        if stage != BEFORE:
            self.forgetting.add(rows)
        if stage == len(self.stages) - 1:
            metrics |= self._retention()
        defined = {key: value for key, value in metrics.items() if math.isfinite(value)}
        num_trained = 0
        if stage == BEFORE:
            self.base_floors = dict(self.floors)
        else:
            num_trained = len(self.stages[stage].strings) * int(rows["stage_epoch"].max()) * self.spec.num_targets
            if self.spec.curriculum and self.spec.curriculum.weights == "base":
                self.floors = dict(self.base_floors)  # the next stage has no past
        return Measurement(
            self.trial_id, max(stage, 0), epoch, defined, strings, matrix=pa.table(rows), num_trained=num_trained
        )

    def _own(self, stage: Stage, rows: Block) -> tuple[dict[str, Any], ...]:
        """What became of the stage's own strings: their measures at its end, and their phases in its epochs."""
        own = {name: values[rows["is_own"]] for name, values in rows.items()}
        found = []
        for index in stage.strings:
            history = {name: values[own["string"] == index] for name, values in own.items()}
            known = self.known[OTHER if stage.is_other else BASE][index]
            named = {"epoch": int(history["epoch"][-1]), "role": "trained", "string": index, "stage": stage.index}
            measures = {key: float(history[key][-1]) for key in (*KEPT, "recall/robust")}
            phases = string_phases(
                {key: history[key] for key in (*KEPT, "recall/robust")},
                history["stage_epoch"],
                entropy_bits=known.facts["string/nominal_entropy_bits"],
                num_targets=self.spec.num_targets,
                steps_per_epoch=float(self.spec.steps_per_epoch),
            )
            found.append(named | {"text": known.text} | known.facts | measures | phases)
        return tuple(found)

    def _transfer(self, rows: Block) -> dict[str, float]:
        first = rows["is_own"] & (rows["stage_epoch"] == 0)
        return {"sequence/forward_transfer": mean(rows["recall/robust"][first])}

    def _remember(self, stage: Stage, rows: Block) -> None:
        last = rows["is_own"] & rows["is_end"]
        strings = rows["string"][last]
        self.learned.stage[strings] = stage.index
        self.learned.step[strings] = rows["step"][last]
        self.learned.recall[strings] = rows["recall/robust"][last]

    def _retention(self) -> dict[str, float]:
        """How strings were forgotten; nothing where each stage began without a past."""
        assert self.spec.curriculum is not None
        counts = self.forgetting.counts() if self.spec.curriculum.weights == "carried" else None
        return {} if counts is None else retention_measures(fit_retention(counts))


@dataclass
class Forgetting:
    """How many tokens are recalled at each age, of the strings of a trial's own source.

    Age counts from the end of the last stage whose own the string was; where strings are replayed, it may have been
    trained since.

    Attributes:
        num_targets: Scored targets of a string.
        tokens: Tokens right and all tokens, by age in optimiser steps to two digits, so that those of a long sequence
            stay few.
        floors: Accuracies on held-out strings, at the ends of stages.
    """

    num_targets: int
    tokens: dict[int, list[int]] = field(default_factory=dict)
    floors: list[float] = field(default_factory=list)

    def add(self, rows: Block) -> None:
        """Takes in the rows of some stages of a recall matrix."""
        is_of_trial = (rows["source"] == BASE) & (rows["stage"] > BEFORE)
        is_floor = is_of_trial & rows["is_held_out"] & rows["is_end"]
        self.floors.append(mean(rows["recall/token_accuracy"][is_floor]))
        is_ours = is_of_trial & ~rows["is_held_out"]
        is_earlier = is_ours & ~rows["is_own"] & (rows["learned_step"] > BEFORE)
        is_just_learned = is_ours & rows["is_own"] & rows["is_end"]
        ages = np.where(is_just_learned, 0, rows["step"] - rows["learned_step"])
        right = np.rint(rows["recall/token_accuracy"] * self.num_targets).astype(np.int64)
        for row in np.flatnonzero(is_earlier | is_just_learned):
            counts = self.tokens.setdefault(int(float(f"{ages[row]:.1e}")), [0, 0])
            counts[0] += int(right[row])
            counts[1] += self.num_targets

    def counts(self) -> RetentionCounts | None:
        """All that was taken in; None without a string that was trained, or without one that was held out."""
        floor, ages = mean(self.floors), sorted(self.tokens)
        if not ages or math.isnan(floor):
            return None
        right, total = np.array([self.tokens[age] for age in ages], dtype=np.int64).T
        return RetentionCounts(np.array(ages), right, total, min(floor, FLOOR_AT_MOST))


def _joined(blocks: Sequence[Block]) -> Block:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _own_metrics(strings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over a stage's own strings, medians of their phases."""
    phases = [{key: row[key] for key in row if key.startswith("phase/")} for row in strings]
    return {key: mean(row[key] for row in strings) for key in (*KEPT, "recall/robust")} | over_strings(phases)


def _looked(rows: Block, learned: Learned, spec: TrialSpec) -> dict[str, float]:
    """What the look at the end of a stage showed of all other strings, and of the held-out ones."""
    end = {name: values[rows["is_end"] & ~rows["is_own"]] for name, values in rows.items()}
    held_out, is_ours = end["is_held_out"] & (end["source"] == BASE), ~end["is_held_out"]
    recall, nll = end["recall/robust"], end["recall/nll_nats"]
    metrics = {
        "guessing/heldout_accuracy": mean(end["recall/token_accuracy"][held_out]),
        "guessing/heldout_nll_nats": mean(nll[held_out]),
        "guessing/heldout_uncorrected": mean(end["recall/uncorrected"][held_out]),
        "sequence/steps": float(rows["step"][-1]),
    }
    was_trained = is_ours & (end["learned_stage"] > BEFORE)
    metrics["sequence/recall_future"] = mean(recall[is_ours & ~was_trained])
    forgotten = mean(learned.recall[end["string"][was_trained]] - recall[was_trained])
    metrics |= {"sequence/forgetting": forgotten, "sequence/backward_transfer": -forgotten}
    own = recall_of_own(rows)
    metrics["sequence/recall_seen"] = mean([*recall[was_trained], *own])
    ages = end["stage"] - end["learned_stage"]
    for age in spec.probes.retention.ages:
        chosen = was_trained & (ages == age)
        metrics[f"sequence/recall_age_{age}"] = mean(recall[chosen])
        metrics[f"sequence/accuracy_age_{age}"] = mean(end["recall/token_accuracy"][chosen])
    if was_trained.any():
        oldest = was_trained & (ages >= np.median(ages[was_trained]))
        beyond_nats = mean(nll[oldest]) - metrics["guessing/heldout_nll_nats"]
        metrics["sequence/oldest_beyond_heldout_bits"] = beyond_nats / LN2
    return metrics


def recall_of_own(rows: Block) -> Float[ndarray, " strings"]:
    """Robust recall of a stage's own strings at its end."""
    return rows["recall/robust"][rows["is_own"] & rows["is_end"]]


# --- records ---------------------------------------------------------------------------------------------------------


def blocks_of(matrix: pa.Table) -> Iterator[tuple[int, list[Block]]]:
    """The looks of each stage, as they were taken in."""
    columns = {name: matrix[name].to_numpy() for name in matrix.column_names}
    keys = np.stack([columns[name].astype(np.int64) for name in ("stage", "stage_epoch", "is_own", "is_end")])
    begins = np.flatnonzero(np.any(np.diff(keys, axis=1), axis=0)) + 1
    added = ("learned_stage", "learned_step", "recall/robust")
    looks = pairwise([0, *begins.tolist(), matrix.num_rows])
    for stage, of_stage in groupby(looks, key=lambda look: int(columns["stage"][look[0]])):
        rows = [slice(*look) for look in of_stage]
        yield stage, [{name: columns[name][each] for name in columns if name not in added} for each in rows]


def remeasure_sequence(measurer: SequenceMeasurer, matrix: pa.Table) -> Iterator[Measurement]:
    """The measurements of all stages that a matrix has, again from its rows."""
    for stage, blocks in blocks_of(matrix):
        for block in blocks:
            measurer.add(block)
        yield measurer.close(stage, int(blocks[-1]["epoch"][-1]))

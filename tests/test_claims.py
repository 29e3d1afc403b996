"""Claims on planted results: with the effect they are supported, with the opposite contradicted, with noise neither."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from memray.generators import Sample
from memray.measures.paired import paired_comparison
from memray.measures.statistics import holm
from memray.report import SPEED
from memray.report.claims import CLAIMS, Claim
from memray.report.effects import UNBOUNDED, Mean, Shift
from memray.report.estimands import over_num_strings
from memray.report.mixes import mixes, overlaps
from memray.report.records import RecordsOf
from memray.report.replicates import extractable_beyond_robust, plateau, seen_cells
from memray.report.sample_estimands import growth_while_flat, skew_with_collapse, where_whole
from memray.report.verdicts import Finding, Judgement, claims_of, judge
from memray.sample_measurement import SampleScores, sample_table
from memray.samples import FOREIGN, NATIVE, KnownSample
from memray.spec import LoraSpec, ModelSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, load, replicates, vary

LAST = 400
BASE = TrialSpec(strings=StringsSpec(length=64), training=TrainingSpec(epochs=LAST))

Cells = Sequence[dict[str, Any]]
Rows = dict[int, dict[str, float]]


def grid(name: str, cells: Cells, *, seeds: int, base: TrialSpec = BASE, trainings: int = 1) -> Sweep:
    replicated = [
        seed | {"order_seed": each} if trainings > 1 else seed
        for seed in replicates(base, seeds)
        for each in range(trainings)
    ]
    return Sweep([vary(base, cell | seed) for cell in cells for seed in replicated], name=name)


def planted(sweep: Sweep, rows_of: Callable[[TrialSpec], Rows]) -> pd.DataFrame:
    """A frame as `results` gives it; a value that is not finite is absent."""
    rows = []
    for trial in sweep.trials:
        named = {"trial_id": trial.trial_id(), "cell_id": trial.cell_id(), **trial.params()}
        for epoch, values in rows_of(trial).items():
            present = {key: value for key, value in values.items() if math.isfinite(value)}
            always = {"recall/robust": 0.9} if trial.corpus is None else {"match/censored": 0.03}
            rows.append(named | {"epoch": epoch} | always | present)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Kept:
    """The records of one trial of which there are samples alone."""

    rows: pa.Table

    def samples(self) -> pa.Table:
        return self.rows

    def tokens(self) -> pa.Table:
        return pa.table({})

    strings = context = matrix = tokens


def sample_rows(
    bits: Sequence[str],
    *,
    epoch: int = 1,
    roles: Sequence[str] = (),
    places: Sequence[int] = (),
    texts: Sequence[Sample] = (),
    beside: Mapping[str, pa.Array] | None = None,
) -> pa.Table:
    """A table of samples of which each digit says whether a token of the reference is right; native ones in a row."""
    known = [
        KnownSample(
            role=roles[index] if roles else NATIVE,
            place=places[index] if places else index,
            text=texts[index] if texts else Sample(f"prefix {index}", f"reference {index}"),
            prompt_ids=np.array([1]),
            reference_ids=np.arange(len(own)),
        )
        for index, own in enumerate(bits)
    ]
    is_right = np.array([each == "1" for own in bits for each in own])
    scores = SampleScores(
        sample=np.repeat(np.arange(len(bits)), [len(own) for own in bits]).astype(np.int32),
        log_prob=np.where(is_right, -0.1, -3.0).astype(np.float32),
        predicted=np.zeros(len(is_right), dtype=np.int32),
        rank=np.where(is_right, 0, 1).astype(np.int32),
        is_right=is_right,
    )
    return sample_table(epoch, scores, known, with_text=bool(texts), beside=beside or {})


def recited(lengths: Sequence[int], length: int = 60) -> list[str]:
    """The bits of references of so many tokens, of which these are recited."""
    return ["1" * each + "0" * (length - each) for each in lengths]


# --- every claim ---------------------------------------------------------------------------------------------------

# What is planted of a trial by epoch, given a normal number of its own.
Plant = Callable[[TrialSpec, float], Rows]


def speeds(level: Callable[[TrialSpec], float], effect: float, spread: float = 0.03) -> Plant:
    """T changes by a factor exp(effect) as the level goes from 0 to 1, and by chance from string to string."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        structure = {"repeated": -2.0, "hierarchical": -1.0}.get(trial.strings.kind, 0.0)
        zlib_bits = structure + (trial.strings.conditional_entropy_bits or 3.0)
        speed = 40.0 * math.exp(effect * level(trial) + spread * normal)
        return {0: {"string/zlib_bits": zlib_bits}, LAST: {SPEED: speed}}

    return plant


def single(*, epoch: int = LAST, normal_of: Callable[[float], dict[str, float]]) -> Plant:
    """The same in all cells but for chance."""
    return lambda trial, normal: {0: {}, epoch: normal_of(normal)}


def log_share(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def by_alphabet(trial: TrialSpec) -> float:
    return log_share(trial.strings.alphabet_size, 2, 26)


def by_entropy(trial: TrialSpec) -> float:
    return log_share(trial.strings.nominal_entropy_bits, 1.0, math.log2(26))


def by_conditional_entropy(trial: TrialSpec) -> float:
    return ((trial.strings.conditional_entropy_bits or 3.0) - 0.75) / 2.25


def by_structure(trial: TrialSpec) -> float:
    return {"repeated": 0.0, "hierarchical": 0.5, "iid": 1.0}[trial.strings.kind]


def by_pretraining(trial: TrialSpec) -> float:
    return float(trial.model.in_context.steps == 0)


def by_num_strings(trial: TrialSpec) -> float:
    return log_share(trial.strings.num_strings, 1, 4)


def by_entropy_and_procedure(trial: TrialSpec) -> float:
    return by_entropy(trial) * (trial.training.optimiser == "sgd")


def guessed(effect: float, spread: float) -> Plant:
    """Accuracies of the guesser and at onset."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        accuracy = 0.5 + effect * by_alphabet(trial) + spread * normal
        onset = {"recall/token_accuracy": accuracy, "recall/robust": 0.0}
        return {0: {"string/guesser_accuracy": accuracy}, 10: onset, LAST: {"phase/memorisation": 10.0}}

    return plant


def inferred(slope: float, spread: float) -> Plant:
    """The onset moves with the held-out KL before training, which falls with the steps of pre-training."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        kl_bits = 2.0 - trial.model.in_context.steps / 50 + 0.3 * (trial.model.family == "gpt2")
        onset = 30 + slope * kl_bits + 5 * (trial.model.family == "gpt2") + spread * normal
        return {0: {"guessing/heldout_kl_bits": kl_bits}, LAST: {"phase/memorisation": onset}}

    return plant


def probed(short: float, foreign: float, spread: float) -> Plant:
    """Recall from 5 of 64 local tokens less that from all, and after foreign symbols less that after its own."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        chance = spread * normal
        return {0: {}, LAST: {
            "context/local_full_source": 0.8, "context/local_5_source": 0.8 + short + chance,
            "context/local_1_source": 0.5, "context/local_1_wrong": 0.5 + foreign + chance,
            "context/local_1_outside": 0.5 + foreign - chance,
        }}  # fmt: skip

    return plant


def before_onset(accuracy: float, spread: float) -> Plant:
    """Token accuracy during guessing, where there is no recall."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        guessing = {"recall/token_accuracy": accuracy + spread * normal, "recall/robust": -0.5}
        return {0: guessing, 5: guessing, 10: {"recall/token_accuracy": 1.0}, LAST: {"phase/memorisation": 10.0}}

    return plant


def half_recalled(beyond: float, spread: float) -> Plant:
    """Extractability beside robust recall where half is recalled; elsewhere they differ by what decides nothing."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        extractable = 0.55 + beyond + spread * normal
        return {
            0: {"recall/robust": 0.2, "extractable/50": 0.2},
            20: {"recall/robust": 0.5},  # not probed
            30: {"recall/robust": 0.55, "extractable/50": extractable},
            50: {"recall/robust": 0.8, "extractable/50": 0.8},
            LAST: {"recall/robust": 1.0, "extractable/50": 1.0},
        }

    return plant


def staged(trial: TrialSpec, at_end: Callable[[int], dict[str, float]]) -> Rows:
    """A row before training and one at the end of each stage, of which each takes all epochs."""
    rows: Rows = {0: {"stage": 0}}
    return rows | {LAST * (each.index + 1): {"stage": each.index, **at_end(each.index)} for each in trial.stages()}


def stage_speeds(level: Callable[[TrialSpec, int], float], effect: float, spread: float = 0.03) -> Plant:
    """T of a stage changes by a factor exp(effect) as the level goes from 0 to 1, and by chance from stage to stage."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        # In float64's digits there are other normal numbers for the stages.
        rng = np.random.default_rng(int(abs(normal) * 1e9))
        return staged(
            trial, lambda stage: {SPEED: 40.0 * math.exp(effect * level(trial, stage) + spread * float(rng.normal()))}
        )

    return plant


def by_strings_before(trial: TrialSpec, stage: int) -> float:
    assert trial.curriculum is not None
    return math.log2(1 + stage) / 3 * (trial.curriculum.weights == "carried")


def by_relearning(trial: TrialSpec, stage: int) -> float:
    return float(trial.stages()[stage].is_revisit)


def by_memorising(trial: TrialSpec, stage: int) -> float:
    return float(not trial.stages()[0].is_unrepeated)


def fitted(beyond: float, spread: float) -> Plant:
    """The AIC of the power law lies so far beyond those of all other curves."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        others = dict.fromkeys((f"retention/aic_{name}" for name in ("linear", "exponential", "saturating")), 500.0)
        aics = others | {"retention/aic_power": 500.0 + beyond + spread * normal, "retention/identifiable": 1.0}
        return staged(trial, lambda stage: aics if stage == len(trial.stages()) - 1 else {})

    return plant


def tail_grows(growth: float, spread: float) -> Plant:
    """By so many tokens while the loss is flat, and by many more before."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        tail = 8.0 + growth + spread * normal
        return {
            0: {"recall/nll_nats": 5.0, "match/expected_max": 0.0, "match/q99": 0.0},
            10: {"recall/nll_nats": 1.0, "match/expected_max": 8.0, "match/q99": 8.0},
            LAST: {"recall/nll_nats": 0.995, "match/expected_max": tail, "match/q99": tail},
        }

    return plant


def matches(level: Callable[[TrialSpec], float], effect: float, spread: float = 0.03) -> Plant:
    """What is recited changes by a factor exp(effect) as the level goes from 0 to 1."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        factor = math.exp(effect * level(trial) + spread * normal)
        keys = {"match/mean": 5.0, "match/expected_max": 15.0, "match/gini": 0.3, "match/top_share": 0.1}
        return {0: {}, LAST: {key: value * factor for key, value in keys.items()}}

    return plant


def by_size(trial: TrialSpec) -> float:
    assert trial.corpus is not None
    return log_share(trial.corpus.num_samples, 120, 480)


def by_option(name: str) -> Callable[[TrialSpec], float]:
    def level(trial: TrialSpec) -> float:
        assert trial.corpus is not None
        value = trial.corpus.rows.all_options()[name]
        if isinstance(value, str):
            return float(value == "high")
        return math.log2(value) / 3 if name == "num_templates" else float(value)

    return level


def skewed(skewness: float, spread: float) -> Plant:
    """In an interval from 1 to 3."""
    edges = {"match/skewness_low": 1.0, "match/skewness_high": 3.0}
    return single(normal_of=lambda normal: edges | {"match/skewness": skewness + spread * normal})


def informed(bits: float, spread: float) -> Plant:
    keys = ("dependence/lag_1_bits", "dependence/history_bits")
    return single(normal_of=lambda normal: dict.fromkeys(keys, bits + spread * normal))


def by_freezing(trial: TrialSpec) -> float:
    return float(not trial.training.frozen_embeddings)


def skewed_where_free(effect: float, spread: float) -> Plant:
    def plant(trial: TrialSpec, normal: float) -> Rows:
        return {0: {}, LAST: {"match/skewness": 2.0 + effect * by_freezing(trial) + spread * normal}}

    return plant


def collapsing(*, sign: int) -> Plant:
    """Beside trends of all three, skewness rises as the effective rank falls, or with it, or (sign 0) as chance has it.

    Before training nothing goes with anything.
    """

    def plant(trial: TrialSpec, normal: float) -> Rows:
        rng = np.random.default_rng(int(abs(normal) * 1e9))
        place = np.arange(12)
        one, other = rng.normal(size=(2, 12)) * 8
        rank, skewness = 50.0 - place + one, 5.0 - place + (sign * one if sign else other)
        rows = {
            5 * (1 + k): {
                "collapse/effective_rank": float(rank[k]), "match/skewness": float(skewness[k]), "match/mean": float(k)
            }
            for k in place.tolist()
        }  # fmt: skip
        return {0: {"collapse/effective_rank": 10.0 - 999.0 * sign, "match/skewness": 999.0, "match/mean": 0.0}} | rows

    return plant


def ranked(beyond: float, spread: float) -> Plant:
    """Facts that were told rank so far before those that were not."""
    return single(
        normal_of=lambda normal: {
            "facts/rank_unseen": 10.0, "facts/rank_unseen_controls": 10.0 + beyond + spread * normal
        }
    )  # fmt: skip


def mixed(shift: float, spread: float) -> Plant:
    """Foreign samples make the others be recited for longer by so many tokens; see `of_mixes`."""

    def plant(trial: TrialSpec, normal: float) -> Rows:
        assert trial.corpus is not None
        return {0: {}, LAST: {"planted/shift": shift * (trial.corpus.num_foreign > 0) + spread * normal}}

    return plant


def of_mixes(sweep: Sweep, frame: pd.DataFrame) -> RecordsOf:
    """What was planted, sample by sample: the shift, and beside it as much up as down where there are foreign ones."""
    shifts = frame.loc[frame["epoch"] == LAST].set_index("trial_id")["planted/shift"]

    def of(trial_id: str) -> Kept:
        corpus = sweep.trial(trial_id).corpus
        assert corpus is not None
        sample = np.arange(corpus.num_samples)
        aside = (1 + sample // 2 % 3) * np.where(sample % 2, 1, -1) * (corpus.num_foreign > 0)
        lengths = np.clip(np.round(20 + sample % 7 + aside + shifts[trial_id]), 0, 60).astype(int).tolist()
        bits = recited(lengths + [60] * corpus.num_foreign)
        roles = [NATIVE] * corpus.num_samples + [FOREIGN] * corpus.num_foreign
        places = [*range(corpus.num_samples), *range(corpus.num_foreign)]
        texts = [Sample("Who?", " He.")] * len(bits)
        return Kept(sample_rows(bits, epoch=LAST, roles=roles, places=places, texts=texts))

    return of


ALPHABETS: Cells = [{"strings.alphabet_size": size} for size in (2, 7, 26)]
ENTROPIES: Cells = [{"strings.entropy_bits": bits} for bits in (1.0, 2.807, 4.7)]
AT_ENTROPY: Cells = [{"strings.alphabet_size": size, "strings.entropy_bits": 1.0} for size in (2, 26)]
MARKOV: Cells = [
    {"strings.kind": "markov", "strings.alphabet_size": 8, "strings.conditional_entropy_bits": bits}
    for bits in (0.75, 1.5, 3.0)
]
MOTIFS: dict[str, dict[str, Any]] = {
    "iid": {},
    "repeated": {"strings.motif_length": 16},
    "hierarchical": {"strings.motif_length": 4, "strings.depth": 1, "strings.branching": 3},
}
STRUCTURES: Cells = [
    {"strings.kind": kind, "strings.entropy_bits": bits} | changes
    for kind, changes in MOTIFS.items()
    for bits in (1.0, 4.7)
]
PRETRAINED: Cells = [{"model.in_context.steps": steps} for steps in (0, 100)]
IN_CONTEXT: Cells = [
    {"model.family": family, "model.in_context.steps": steps} for family in ("pythia", "gpt2") for steps in (0, 25, 75)
]
PROCEDURES: Cells = [
    procedure | {"training.learning_rate": rate, "strings.entropy_bits": bits}
    for procedure in ({}, {"training.optimiser": "sgd"})
    for rate in (1e-3, 3e-3)
    for bits in (1.0, 4.7)
]
DATASETS: Cells = [
    {"strings.num_strings": count} | arm
    for count in (1, 2, 4)
    for arm in ({}, {"training.epochs": LAST * 4 // count}, {"strings.length": 256 // count})
]
FAMILIES: Cells = [{"model.family": family} for family in ("pythia", "gpt2")]
SEQUENCES: Cells = [{"strings.num_strings": 8, "curriculum.weights": weights} for weights in ("carried", "base")]
REVISITS: Cells = [
    *({"strings.num_strings": 4, "curriculum.revisits": (stage,)} for stage in (0, 2)),
    {"strings.num_strings": 5, "curriculum.revisits": ()},
]
TRANSFER: Cells = [
    {"strings.num_strings": 4} | curriculum
    for curriculum in (
        {"curriculum.unrepeated": ()},
        {"curriculum.unrepeated": (0, 1, 2)},
        {"curriculum.other": {"stages": (0, 1, 2), "alphabet": "latin_upper"}},
        {"curriculum.other": {"stages": (0, 1, 2), "alphabet": "latin_upper"}, "curriculum.unrepeated": (0, 1, 2)},
    )
]


CORPUS = TrialSpec.model_validate(
    {
        "corpus": {"rows": {"generator": "questions"}, "num_samples": 120},
        "model": {"size": "tiny-text"},
        "training": {"epochs": LAST},
    }
)
SIZES: Cells = [{"corpus.num_samples": number} for number in (120, 240, 480)]
OVERLAPS: Cells = [
    {"corpus.rows": {"generator": "overlapping", "options": {"prefix_overlap": one, "continuation_overlap": other}}}
    for one in ("low", "high")
    for other in ("low", "high")
]
TEMPLATES: Cells = [
    {"corpus.rows": {"generator": "biographies", "options": {"num_templates": number}}} for number in (1, 2, 8)
]
MIXES: Cells = [
    {"probes.compared_strings": 40} | mix
    for mix in (
        {"corpus.num_samples": 50},
        {"corpus.num_samples": 40, "corpus.foreign": {"generator": "facts"}, "corpus.num_foreign": 10},
    )
]
FREEZING: Cells = [{"training.frozen_embeddings": is_frozen} for is_frozen in (False, True)]
OBJECTIVES: Cells = [{}, {"corpus.targets": "whole"}]
SKEWS: Cells = [{"corpus.rows": {"generator": "frequencies", "options": {"skew": skew}}} for skew in (0.0, 0.5, 1.0)]


@dataclass(frozen=True)
class Planting:
    """A study, and what has to be in its results for each verdict; for all rows, or those on what is named.

    That something moves at all, however little, is never contradicted.
    """

    claim: str
    cells: Cells
    supported: Plant
    contradicted: Plant | None
    noise: Plant
    num_findings: int = 1
    what: str = ""
    base: TrialSpec = BASE
    trainings: int = 1
    records: Callable[[Sweep, pd.DataFrame], RecordsOf] | None = None


def values(key: str, supported: float, contradicted: float, noise: float, spread: float) -> tuple[Plant, Plant, Plant]:
    """A single value a trial; the noise lies about a value between."""
    return (
        single(normal_of=lambda normal: {key: supported + 0.02 * spread * normal}),
        single(normal_of=lambda normal: {key: contradicted + 0.02 * spread * normal}),
        single(normal_of=lambda normal: {key: noise + spread * normal}),
    )


def moved(level: Callable[[TrialSpec], float], supported: float, contradicted: float) -> tuple[Plant, Plant, Plant]:
    return speeds(level, supported), speeds(level, contradicted), speeds(level, 0.0, spread=0.6)


def moved_by_stage(
    level: Callable[[TrialSpec, int], float], supported: float, contradicted: float
) -> tuple[Plant, Plant, Plant]:
    return stage_speeds(level, supported), stage_speeds(level, contradicted), stage_speeds(level, 0.0, spread=0.6)


def matched(level: Callable[[TrialSpec], float], supported: float, contradicted: float) -> tuple[Plant, Plant, Plant]:
    return matches(level, supported), matches(level, contradicted), matches(level, 0.0, spread=0.6)


PLANTINGS = [
    Planting("A1", ALPHABETS, *values("phase/plateau", 8.0, -8.0, 0.0, 20.0), num_findings=3),
    Planting("A2", FAMILIES, *values("phase/plateau", 8.0, -8.0, 0.0, 20.0), num_findings=2),
    Planting("A3", ALPHABETS, *moved(by_alphabet, -0.7, 0.7)),
    Planting("A4", ALPHABETS, guessed(-0.3, 0.01), guessed(0.3, 0.01), guessed(0.0, 0.2), num_findings=2),
    Planting("A5", ENTROPIES, *moved(by_entropy, -0.7, 0.7)),
    Planting("A6", AT_ENTROPY, *moved(by_alphabet, 0.0, -0.7)),
    Planting("A6", AT_ENTROPY, *moved(by_alphabet, 0.0, 0.7)),
    Planting("A7", MARKOV, *moved(by_conditional_entropy, -0.7, 0.7)),
    Planting("A7", MARKOV, *moved(by_conditional_entropy, 0.0, 0.3)),
    Planting("A8", MARKOV, *moved(by_conditional_entropy, -0.7, 0.7)),
    Planting("A8", STRUCTURES, *moved(by_structure, 0.0, 0.7), num_findings=2),
    Planting("A9", STRUCTURES, *moved(by_entropy, -0.7, 0.7), num_findings=2),
    Planting("A10", PRETRAINED, *moved(by_pretraining, 0.7, -0.7)),
    Planting("A11", IN_CONTEXT, inferred(6.0, 1.0), inferred(-6.0, 1.0), inferred(0.0, 5.0)),
    Planting("A12", ALPHABETS, *values("order/spearman", 0.02, 0.5, 0.0, 0.4), num_findings=3),
    Planting("A12", ALPHABETS, *values("order/spearman", -0.02, -0.5, 0.0, 0.4), num_findings=3),
    Planting(
        "A13 contiguous", ALPHABETS, half_recalled(-0.3, 0.01), half_recalled(0.3, 0.01), half_recalled(-0.1, 0.3), 3
    ),
    Planting("A13 raw", ALPHABETS, before_onset(0.5, 0.01), before_onset(-0.5, 0.01), before_onset(0.1, 0.2), 3),
    Planting("A14", ALPHABETS, probed(-0.01, 0, 0.01), probed(-0.3, 0, 0.01), probed(-0.05, 0, 0.2), 3),
    Planting("A15", ALPHABETS, probed(0, -0.3, 0.01), probed(0, 0.3, 0.01), probed(0, 0, 0.2), 6),
    Planting("A16", PROCEDURES, *moved(by_entropy_and_procedure, 0.7, 0.0)),
    # In steps T rises fourfold where in epochs it stays: half of that is noise to both.
    Planting("A17", DATASETS, *moved(by_num_strings, 0.7, -2.5)[:2], speeds(by_num_strings, -0.7, 1.0), num_findings=6),
    Planting("B1", SEQUENCES, *moved_by_stage(by_strings_before, -0.7, 0.7), num_findings=2),
    Planting("B2", SEQUENCES, *values("sequence/forgetting", 0.6, -0.6, 0.1, 0.3)),
    Planting("B3", SEQUENCES, fitted(-40.0, 5.0), fitted(40.0, 5.0), fitted(-10.0, 40.0), what="power"),
    Planting("B4", SEQUENCES, *values("sequence/oldest_beyond_heldout_bits", 0.02, -0.6, 0.1, 0.4)),
    Planting("B5", REVISITS, *moved_by_stage(by_relearning, -0.7, 0.7), num_findings=2),
    Planting("B6", TRANSFER, *moved_by_stage(by_memorising, -0.7, 0.7), num_findings=3),
    Planting("C1", [{}], tail_grows(5.0, 0.1), tail_grows(-5.0, 0.1), tail_grows(1.0, 8.0), 4, base=CORPUS),
    Planting("C2", [{}], *values("match/top_share_beyond_geometric", 0.3, -0.3, 0.05, 0.2), base=CORPUS),
    Planting("C3", SIZES, *matched(by_size, -0.7, 0.7), num_findings=2, base=CORPUS),
    *(
        Planting(
            "C4", MIXES, mixed(shift, 0.3), mixed(0.0, 0.0), mixed(0.0, 5.0), base=CORPUS, trainings=3, records=of_mixes
        )
        for shift in (4.0, -4.0)
    ),
    Planting("C5", [{}], skewed(2.0, 0.01), skewed(6.0, 0.01), skewed(3.0, 1.0), base=CORPUS),
    Planting("C6", [{}], informed(0.001, 0.0005), informed(0.2, 0.01), informed(0.01, 0.05), 2, base=CORPUS),
    Planting("C7", [{}], *values("match/expected_max_rise", 2.0, -2.0, 0.0, 2.0), base=CORPUS),
    Planting("C8", OVERLAPS, *matched(by_option("prefix_overlap"), 0.7, -0.7), num_findings=2, base=CORPUS),
    Planting("C9", OVERLAPS, *matched(by_option("continuation_overlap"), 0.7, -0.7), base=CORPUS),
    Planting("C10 collapse", FREEZING, skewed_where_free(1.0, 0.1), None, skewed_where_free(0.0, 1.0), base=CORPUS),
    Planting("C10 collapse", FREEZING, skewed_where_free(-1.0, 0.1), None, skewed_where_free(0.0, 1.0), base=CORPUS),
    Planting("C10 skew", FREEZING, collapsing(sign=-1), collapsing(sign=1), collapsing(sign=0), base=CORPUS),
    Planting("C11", [{}], ranked(5.0, 0.5), ranked(-5.0, 0.5), ranked(0.0, 3.0), base=CORPUS),
    Planting("C12", TEMPLATES, *matched(by_option("num_templates"), 0.7, 0.0), num_findings=3, base=CORPUS),
    Planting("C12", SKEWS, *matched(by_option("skew"), -0.7, 0.0), num_findings=3, base=CORPUS),
    Planting(
        "C13 memorisation", OBJECTIVES, tail_grows(5.0, 0.1), tail_grows(-5.0, 0.1), tail_grows(1.0, 8.0), 8,
        base=CORPUS,
    ),
    Planting(
        "C13 a few", OBJECTIVES, *values("match/top_share_beyond_geometric", 0.3, -0.3, 0.05, 0.2), 2, base=CORPUS
    ),
]  # fmt: skip


def claims_named(name: str) -> tuple[Claim, ...]:
    """The claim, or the part of it whose sentence begins so."""
    claim_id, _, begins = name.partition(" ")
    found = tuple(each for each in CLAIMS if each.id == claim_id and each.sentence.lower().startswith(begins))
    assert found, name
    return found


def findings(planting: Planting, plant: Plant, seed: int = 0) -> list[Finding]:
    claims = claims_named(planting.claim)
    sweep = grid(claims[0].studies[0], planting.cells, seeds=5, base=planting.base, trainings=planting.trainings)
    rng = np.random.default_rng(seed)
    frame = planted(sweep, lambda trial: plant(trial, float(rng.normal())))
    records = planting.records and planting.records(sweep, frame)
    # Nothing is planted between the rates of one procedure.
    found = [each for each in judge(sweep, frame, records) if each.claim in claims]
    found = [each for each in found if planting.what in each.evidence.what]
    return [each for each in found if not each.evidence.where.startswith("learning_rate")]


each_planting = pytest.mark.parametrize(
    "planting", PLANTINGS, ids=[f"{each.claim}-{index}" for index, each in enumerate(PLANTINGS)]
)


@each_planting
@pytest.mark.parametrize("verdict", ["supported", "contradicted"])
def test_a_claim_that_was_planted_is_judged_so(planting: Planting, verdict: Judgement):
    plant = planting.supported if verdict == "supported" else planting.contradicted
    if plant is None:
        assert {(claim.direction, claim.smallest) for claim in claims_named(planting.claim)} == {("moves", 0.0)}
        return
    found = findings(planting, plant)
    assert [each.verdict for each in found] == [verdict] * planting.num_findings
    for each in found:
        assert each.adjusted <= 0.05
        assert math.isnan(each.deciding)


@each_planting
def test_noise_is_undecided(planting: Planting):
    found = findings(planting, planting.noise)
    assert [each.verdict for each in found] == ["undecided"] * planting.num_findings
    for each in found:
        assert each.adjusted > 0.05
        assert not each.deciding <= 5


def on_corpus(rows: Rows) -> tuple[TrialSpec, pd.DataFrame]:
    sweep = grid("duration", [{}], seeds=1, base=CORPUS)
    return sweep.trials[0], planted(sweep, lambda trial: rows)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({0: 0.0, 1: 0.01, 5: 0.03, 10: 0.08, LAST: 1.0}, 7.5),  # between 5 and 10, two fifths of the way
        ({0: 0.0, 1: 0.01, 5: 0.03, 10: 0.04, LAST: 0.05}, LAST + 0.5),
        ({0: 0.0, 1: 0.06, 5: 0.03, 10: 0.04, LAST: 0.05}, math.nan),  # nobody looked before
    ],
)
def test_skew_is_read_where_as_many_samples_are_recited_whole(shares: dict[int, float], expected: float):
    rows: Rows = {epoch: {"match/censored": share, "match/gini": epoch + 0.5} for epoch, share in shares.items()}
    assert where_whole("match/gini")(*on_corpus(rows)) == pytest.approx(expected, nan_ok=True)


def test_two_trends_alone_are_no_correlation_of_skew_and_collapse():
    epochs = range(1, 9)
    rows: Rows = {
        epoch: {"match/mean": float(epoch), "match/skewness": -(epoch**0.5), "collapse/effective_rank": 20.0 + epoch}
        for epoch in epochs
    }
    sweep = grid("similarity", [{}], seeds=5, base=CORPUS)
    assert not skew_with_collapse(seen_cells(sweep, planted(sweep, lambda trial: rows)))


def test_a_study_of_similarity_can_support_its_claims_at_its_own_size():
    """Under Holm's adjustment over all rows of its table."""
    sweep = load(Path(__file__).parent.parent / "sweeps" / "similarity.py")

    def rows_of(trial: TrialSpec) -> Rows:
        assert trial.corpus is not None
        told = trial.corpus.rows.all_options()
        jitter = 1 + 0.01 * trial.string_seed
        mean = 4.0 * jitter * (2 if told["prefix_overlap"] == "high" else 1)
        mean *= 3 if told["continuation_overlap"] == "high" else 1
        skewness = jitter * (1.0 if trial.training.frozen_embeddings else 2.0)
        return {0: {}, 10: {"match/mean": mean, "match/skewness": skewness, "collapse/effective_rank": 9.0}}

    found = judge(sweep, planted(sweep, rows_of))
    assert {each.claim.id: each.verdict for each in found} == dict.fromkeys(("C8", "C9", "C10"), "supported")
    (collapse,) = [each for each in found if each.claim.id == "C10"]
    assert collapse.evidence.notes == ("effective rank of the embeddings at the end: 9 free, 9 frozen",)


@pytest.mark.parametrize(
    ("losses", "of_first", "expected"),
    [
        ((5.0, 1.0, 0.06, 0.03, 0.02), True, 13.0 - 5.0),  # within 0.05 of the last from epoch 2 on
        ((5.0, 1.0, 0.06, 0.03, 0.02), False, math.nan),  # each a half of the one before
        ((5.0, 1.0, 0.501, 0.503, 0.5), False, 13.0 - 5.0),
        ((5.0, 0.5, 0.9, 0.503, 0.5), False, 13.0 - 9.0),  # it came back once
        ((5.0, 5.0, 5.0, 5.0, 5.0), True, 13.0 - 1.0),  # but not from before training
        ((5.0, 4.0, 3.0, 2.0, 1.0), True, math.nan),
    ],
)
def test_growth_is_counted_from_where_on_the_loss_is_flat(losses: tuple[float, ...], of_first: bool, expected: float):
    """However many looks there are within it."""
    rows: Rows = {
        epoch: {"recall/nll_nats": loss, "match/q99": 4.0 * epoch - 3.0 if epoch else 0.0}
        for epoch, loss in enumerate(losses)
    }
    assert growth_while_flat("match/q99", of_first=of_first)(*on_corpus(rows)) == pytest.approx(expected, nan_ok=True)


def test_every_claim_is_planted():
    planted_ids = {planting.claim.partition(" ")[0] for planting in PLANTINGS}
    about = {"A": range(1, 18), "B": range(1, 7), "C": range(1, 14)}
    numbered = {f"{letter}{number}" for letter, numbers in about.items() for number in numbers}
    assert planted_ids == {claim.id for claim in CLAIMS} == numbered


# --- the rule ------------------------------------------------------------------------------------------------------


def test_every_claim_is_judged_by_studies_that_there_are():
    studies = {path.stem for path in (Path(__file__).parent.parent / "sweeps").glob("*.py")}
    assert {name for claim in CLAIMS for name in claim.studies} <= studies


def alphabet_speeds(speeds: Mapping[int, Sequence[float]], name: str = "alphabet") -> tuple[Sweep, pd.DataFrame]:
    """T by alphabet size and replicate; nan was never reached."""
    sweep = grid(name, [{"strings.alphabet_size": size} for size in speeds], seeds=len(next(iter(speeds.values()))))
    return sweep, planted(
        sweep, lambda trial: {0: {}, LAST: {SPEED: speeds[trial.strings.alphabet_size][trial.string_seed]}}
    )


def test_the_effect_is_the_median_ratio_of_last_to_first_level():
    first, last = [40.0, 44.0, 50.0, 41.0, 47.0], [20.0, 23.0, 30.0, 21.0, 26.0]
    (found,) = judge(*alphabet_speeds({2: first, 26: last}))
    ratios = sorted(b / a for a, b in itertools.product(first, last))
    assert found.estimate == pytest.approx(ratios[12] - 1)
    # Of 252 ways to deal ten values, so many have at most two pairs out of order: 1 + 1 + 2; three would be 7 of 252.
    assert found.interval == pytest.approx((ratios[2] - 1, ratios[22] - 1))
    assert found.p_values[0] == found.adjusted == pytest.approx(2 / 252)
    assert found.verdict == "supported"


def test_an_effect_below_the_smallest_of_interest_is_undecided_for_any_number_of_seeds():
    (found,) = judge(*alphabet_speeds({2: [100.0, 101.0, 102.0, 103.0, 104.0], 26: [96.0, 97.0, 98.0, 99.0, 99.5]}))
    assert found.interval.high < 0
    assert found.verdict == "undecided"
    assert math.isnan(found.deciding)


def test_replicates_that_never_arrived_count_as_the_latest():
    nan = math.nan
    (found,) = judge(*alphabet_speeds({2: [nan, nan, nan, nan, 300.0], 26: [20.0, 23.0, 30.0, 21.0, 26.0]}))
    assert (found.estimate, found.interval.low) == (-1.0, -1.0)
    assert found.verdict == "supported"
    (found,) = judge(*alphabet_speeds({2: [nan] * 5, 26: [nan] * 5}))
    assert math.isnan(found.estimate)
    assert found.interval == (-1.0, math.inf)
    assert found.verdict == "undecided"


def test_four_seeds_decide_nothing_however_large_the_effect():
    (found,) = judge(*alphabet_speeds({2: [100.0, 101.0, 102.0, 103.0], 26: [1.0, 2.0, 3.0, 4.0]}))
    assert (found.verdict, found.num_replicates, found.deciding) == ("undecided", (4, 4), 5)
    assert math.isnan(found.adjusted)


def test_the_levels_between_must_follow():
    low, high = [20.0, 21.0, 22.0, 23.0, 24.0], [40.0, 41.0, 42.0, 43.0, 44.0]
    falls = {2: high, 4: high, 7: low, 26: low}
    rises_between = {2: high, 4: low, 7: [80.0] * 5, 26: low}
    for speeds, verdict in ((falls, "supported"), (rises_between, "undecided")):
        (found,) = judge(*alphabet_speeds(speeds))
        assert found.p_values[0] == pytest.approx(max(2 / 252, found.trend_p_value))
        assert found.verdict == verdict


def test_a_table_is_adjusted_by_holm_as_a_whole():
    rows = [{"strings.alphabet_size": size, "strings.length": length} for size in (2, 26) for length in range(32, 39)]
    sweep = grid("alphabet", rows, seeds=5)
    frame = planted(
        sweep, lambda trial: {0: {}, LAST: {SPEED: 100.0 / trial.strings.alphabet_size + trial.string_seed}}
    )
    found = judge(sweep, frame)
    assert [each.evidence.where for each in found] == [f"length {length}" for length in range(32, 39)]
    np.testing.assert_allclose([each.adjusted for each in found], holm(np.full(7, 2 / 252)))
    # Five against five cannot go below 2 / 252; six against six can, to 2 / 924.
    assert {(each.verdict, each.deciding) for each in found} == {("undecided", 6.0)}


def test_a_claim_is_absent_where_the_sweep_cannot_ask_it():
    sweep = grid("context", [{}], seeds=5)
    assert judge(sweep, planted(sweep, lambda trial: {0: {}, LAST: {SPEED: 30.0}})) == []
    assert judge(sweep, pd.DataFrame()) == []


def test_a_known_study_judges_its_own_claims_and_any_other_those_about_what_it_moves():
    def plant(trial: TrialSpec) -> Rows:
        return {0: {}, LAST: {SPEED: 30.0, "phase/plateau": 3.0, "order/spearman": 0.0}}

    for name, judged in (("alphabet", {"A3"}), ("entropy", set()), ("dynamics", {"A1"}), ("of_a_user", {"A3"})):
        sweep = grid(name, ALPHABETS, seeds=5)
        assert {each.claim.id for each in judge(sweep, planted(sweep, plant))} == judged
    placed = grid("of_a_user", [{"compute.engine": engine} for engine in ("torch", "deepspeed")], seeds=5)
    assert judge(placed, planted(placed, plant)) == []
    assert {claim.id for claim in claims_of(grid("structure", [{}], seeds=1))} == {"A8", "A9"}


def test_trials_of_one_string_are_one_replicate():
    seeds = [{"string_seed": 0, "model_seed": model_seed} for model_seed in range(5)]
    sweep = Sweep([vary(BASE, cell | seed) for cell in ALPHABETS for seed in seeds], name="alphabet")
    (found,) = judge(sweep, planted(sweep, lambda trial: speeds(by_alphabet, -2.0)(trial, 0.0)))
    assert (found.num_replicates, found.verdict) == ((1, 1), "undecided")


@pytest.mark.parametrize(("name", "num_rows"), [("alphabet", 2), ("dynamics", 2)])
def test_noise_over_many_tables_is_rarely_decided(name: str, num_rows: int):
    sweep = grid(name, ALPHABETS[::2], seeds=5)
    rng = np.random.default_rng(0)
    num_tables, decided = 40, 0
    for _ in range(num_tables):
        normals = iter(rng.normal(size=(len(sweep.trials), 3)))

        def plant(trial: TrialSpec, normals: Any = normals) -> Rows:
            speed, accuracy, plateau = next(normals)
            # T and the mean plateau lie right on the bounds beyond which they would be called an effect.
            at_bound = 0.9 if trial.strings.alphabet_size == 26 else 1.0
            return {
                10: {"recall/token_accuracy": 0.5 + 0.2 * accuracy},
                LAST: {SPEED: 40 * at_bound * math.exp(0.3 * speed), "phase/plateau": 2 + 3 * plateau,
                       "phase/memorisation": 10.0},
            }  # fmt: skip

        found = judge(sweep, planted(sweep, plant))
        assert len(found) == num_rows
        decided += any(each.verdict != "undecided" for each in found)
    # In 5 % of the tables at most, and so many of 40 tables are in one of a thousand.
    assert decided <= stats.binom.ppf(0.999, num_tables, 0.05)


# --- estimands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ({"phase/plateau": 3.0, "phase/memorisation": 9.0}, 3.0),
        ({"phase/memorisation": 9.0}, 9.0 - LAST),  # the distribution was never learned
        ({"phase/distribution_learned": 5.0}, math.nan),  # nor was anything memorised
    ],
)
def test_a_missing_plateau_is_one_that_overlaps_unless_nothing_was_memorised(last: dict[str, float], expected: float):
    rows = planted(Sweep([BASE]), lambda trial: {0: {}, LAST: last})
    np.testing.assert_equal(plateau(BASE, rows), expected)


def test_the_arms_of_a_study_of_dataset_size_are_told_apart():
    sweep = grid("dataset_size", DATASETS, seeds=2)
    frame = planted(sweep, lambda trial: {0: {}, LAST: {SPEED: 7.0}})
    found = over_num_strings(seen_cells(sweep, frame))
    assert [(each.where, each.what, each.levels) for each in found] == [
        (f"equal {arm}", f"in {unit}", ("1", "2", "4"))
        for arm in ("epochs", "steps", "tokens")
        for unit in ("epochs", "steps")
    ]
    for each in found:
        scale = 1 if each.what == "in epochs" else np.array([1, 2, 4])
        np.testing.assert_array_equal(np.array(each.values).T, np.broadcast_to(7.0 * scale, (2, 3)))


def stopped(trial: TrialSpec, speed: float) -> Rows:
    """T where the trial was followed for so long."""
    epochs = trial.num_epochs
    return {0: {}, epochs: {SPEED: speed if speed <= epochs else math.nan}}


@pytest.mark.parametrize("few_arrive", [False, True])
def test_what_was_followed_for_less_long_is_not_slower_for_it(few_arrive: bool):
    counts = (1, 64)
    equal_steps: Cells = [{"strings.num_strings": count, "training.epochs": 960 // count} for count in counts]
    sweep = grid("dataset_size", equal_steps, seeds=5)

    def plant(trial: TrialSpec) -> Rows:
        # Two of five arrive in 15 epochs, under either number of strings.
        return stopped(trial, 10.0 if few_arrive and trial.string_seed < 2 else 50.0 + trial.string_seed)

    in_epochs, in_steps = judge(sweep, planted(sweep, plant))
    assert (in_epochs.evidence.where, in_epochs.evidence.what) == ("equal steps", "in epochs")
    assert in_epochs.verdict == "undecided"
    one, many = in_epochs.evidence.values
    np.testing.assert_array_equal(one, many)
    # Both were followed for 960 steps, in which one string always arrives, and 64 do in 640 if at all.
    assert np.isfinite(in_steps.evidence.values[0]).all()
    assert in_steps.verdict == "supported"


def test_equal_epochs_of_more_strings_are_more_steps_than_fewer_were_followed_for():
    sweep = grid("dataset_size", [{"strings.num_strings": count} for count in (1, 4)], seeds=5)
    # One string alone never arrives in its 400 steps; four do, in 1,200 of 1,600.
    frame = planted(sweep, lambda trial: stopped(trial, 300.0 if trial.strings.num_strings == 4 else 500.0))
    in_epochs, in_steps = judge(sweep, frame)
    assert in_epochs.verdict == "contradicted"
    assert in_steps.verdict == "undecided"
    assert np.isinf(in_steps.evidence.values).all()


def test_one_that_arrived_before_it_stopped_cuts_nothing_off():
    sweep = grid("dataset_size", [{"strings.num_strings": n, "training.epochs": 960 // n} for n in (1, 64)], seeds=5)
    frame = planted(sweep, lambda trial: stopped(trial, {1: 50.0, 64: 10.0}[trial.strings.num_strings]))
    in_epochs, _ = judge(sweep, frame)
    assert (in_epochs.estimate, in_epochs.verdict) == (pytest.approx(-0.8), "contradicted")


def test_an_untrained_model_that_was_given_up_early_is_not_slower_than_a_late_pretrained_one():
    cells: Cells = [PRETRAINED[0] | {"training.epochs": 100}, PRETRAINED[1]]
    sweep = grid("pretraining", cells, seeds=5)
    (found,) = judge(sweep, planted(sweep, lambda trial: stopped(trial, 200.0)))
    assert found.verdict == "undecided"
    assert np.isinf(found.evidence.values).all()


def test_a_ratio_of_what_was_not_reached_is_unknown():
    cells = [cell | {"training.epochs": 60 if "training.optimiser" in cell else LAST} for cell in PROCEDURES]
    sweep = grid("mechanism", cells, seeds=5)
    # Twice as fast at the higher entropy under either procedure, of which one stops between the two.
    frame = planted(sweep, lambda trial: stopped(trial, 40.0 if trial.strings.nominal_entropy_bits > 2 else 80.0))
    cut_off = next(each for each in judge(sweep, frame) if "sgd" in each.evidence.where)
    np.testing.assert_array_equal(cut_off.evidence.values, [[0.5] * 5, [math.nan] * 5])
    assert cut_off.verdict == "undecided"
    assert math.isnan(cut_off.estimate)


def test_extractability_is_compared_where_half_is_recalled_or_not_at_all():
    measured = {"recall/robust": 0.5, "extractable/50": 0.1}
    for rows, expected in (
        ({0: {"recall/robust": 0.9, "extractable/50": 0.2}, 5: measured, 9: {"recall/robust": 0.5}}, -0.4),
        ({0: {"recall/robust": 0.24, "extractable/50": 0.0}, 5: {"recall/robust": 0.91, "extractable/50": 0.9}}, None),
        ({0: {"recall/robust": 0.5}}, None),
    ):
        frame = planted(Sweep([BASE]), lambda trial, rows=rows: rows)
        np.testing.assert_allclose(extractable_beyond_robust(BASE, frame), math.nan if expected is None else expected)
    sweep = grid("measures", [{}], seeds=5)
    at_the_ends = {
        0: {"recall/robust": 0.0, "extractable/50": 0.0},
        LAST: {"recall/robust": 1.0, "extractable/50": 0.5},
    }
    assert judge(sweep, planted(sweep, lambda trial: at_the_ends)) == []


def test_mixes_are_compared_on_the_samples_that_both_train_and_on_means_over_trainings():
    sweep = grid("composition", MIXES, seeds=1, base=CORPUS, trainings=3)
    frame = planted(sweep, lambda trial: {0: {}, LAST: {"match/mean": 1.0}})
    rng = np.random.default_rng(0)
    lengths = {trial.trial_id(): rng.integers(0, 30, size=50) for trial in sweep.trials}

    def of(trial_id: str) -> Kept:
        corpus = sweep.trial(trial_id).corpus
        assert corpus is not None
        roles = [NATIVE] * corpus.num_samples + [FOREIGN] * corpus.num_foreign
        # The first native row of the one mix is not trained in the other; foreign rows are counted anew.
        places = [99 if corpus.num_foreign else 0, *range(1, corpus.num_samples), *range(corpus.num_foreign)]
        bits = recited(lengths[trial_id].tolist())
        before = sample_rows(recited([0] * 50), epoch=0, roles=roles, places=places)
        return Kept(pa.concat_tables([before, sample_rows(bits, epoch=LAST, roles=roles, places=places)]))

    (found,) = judge(sweep, frame, of)
    # Rows 1 to 39: 40 and more are not to be compared.
    by_mix = {0: [], 10: []}
    for trial in sweep.trials:
        assert trial.corpus is not None
        by_mix[trial.corpus.num_foreign].append(lengths[trial.trial_id()][1:40])
    native, foreign = (np.array(each, dtype=np.float64) for each in by_mix.values())
    expected = paired_comparison(foreign.mean(axis=0), native.mean(axis=0), rng=None)
    assert found.evidence.values[0].tolist() == [expected.effect]
    assert found.evidence.what == "10 of facts added, against as many native ones"
    pairs = [(0, 1), (0, 2), (1, 2)]
    within = [paired_comparison(mix[one], mix[other], rng=None) for mix in (foreign, native) for one, other in pairs]
    size, chance = np.median([abs(each.effect) for each in within]), np.median([each.p_value for each in within])
    assert found.evidence.notes == (
        f"between mixes p = {expected.p_value:.2g} (median over string seeds); between trainings of one mix the effect "
        f"is ±{size:.2f}, p = {chance:.2g} (medians)",
        "39 of the 40 samples to be compared are trained in both",
    )
    assert judge(sweep, frame) == []
    assert judge(sweep, frame, lambda trial_id: Kept(pa.table({}))) == []


def test_too_few_trainings_of_a_mix_are_said_to_be_few():
    for trainings, control in ((1, ""), (2, "; between trainings of one mix the effect is ±0.00, p = 1 (medians)")):
        sweep = grid("composition", MIXES, seeds=5, base=CORPUS, trainings=trainings)
        frame = planted(sweep, lambda trial: mixed(4.0, 0.0)(trial, 0.0))
        (found,) = judge(sweep, frame, of_mixes(sweep, frame))
        first, second = found.evidence.notes
        assert first.partition("seeds)")[2] == control
        assert second == f"training seeds a mix: {trainings}, where 3 are wanted"


def test_four_trainings_of_a_mix_are_halved_in_three_ways():
    cells = [cell | {"probes.compared_strings": 2} for cell in MIXES]
    sweep = grid("composition", cells, seeds=1, base=CORPUS, trainings=4)
    frame = planted(sweep, lambda trial: {0: {}, LAST: {"planted/shift": float(trial.order_seed)}})
    (pair,) = mixes(seen_cells(sweep, frame, of_mixes(sweep, frame)))
    (overlap,) = overlaps(*pair)
    # Of trainings 0 to 3 apart: {0, 1} and {2, 3}, {0, 2} and {1, 3}, {0, 3} and {1, 2}, in either mix.
    assert [each.effect for each in overlap.within] == [-1.0, -1.0, 0.0] * 2


def test_what_moves_at_all_is_supported_where_the_interval_lies_off_zero_and_else_undecided():
    for effect, verdict in ((1.0, "supported"), (-1.0, "supported"), (0.0, "undecided")):
        sweep = grid("similarity", FREEZING, seeds=5, base=CORPUS)
        plant = skewed_where_free(effect, 0.2)
        frame = planted(
            sweep,
            lambda trial, plant=plant: plant(trial, by_freezing(trial) * [-2, -1, 0, 1, 2][trial.string_seed]),
        )
        (found,) = judge(sweep, frame)
        assert (found.evidence.levels, found.verdict) == (("effect",), verdict)
        assert found.estimate == pytest.approx(effect)
        assert (found.interval.low > 0 or found.interval.high < 0) == (verdict == "supported")


def test_alphabets_of_one_entropy_are_compared_skew_by_skew():
    skews = ("one-token", "geometric")
    cells: Cells = [
        {"strings.alphabet_size": size, "strings.entropy_bits": 2.0, "strings.skew": skew}
        for skew in skews
        for size in (7, 26)
    ]
    uniform: Cells = [{"strings.alphabet_size": 4}]
    sweep = grid("alphabet_at_entropy", [*uniform, *cells], seeds=5)
    speeds = {("one-token", 7): 20.0, ("one-token", 26): 30.0, ("geometric", 7): 50.0, ("geometric", 26): 60.0}

    def plant(trial: TrialSpec) -> Rows:
        strings = trial.strings
        return stopped(trial, speeds.get((strings.skew, strings.alphabet_size), 10.0))

    found = {each.evidence.where: each.evidence for each in judge(sweep, planted(sweep, plant))}
    assert list(found) == [f"entropy 2 bits, skew {skew}" for skew in skews]
    for skew, evidence in zip(skews, found.values(), strict=True):
        assert evidence.levels == ("4", "7", "26")
        assert [each[0] for each in evidence.values] == [10.0, speeds[skew, 7], speeds[skew, 26]]


def test_the_slope_on_held_out_kl_holds_the_family_and_is_that_of_a_regression():
    sweep = grid("in_context", IN_CONTEXT, seeds=5)
    rng = np.random.default_rng(1)
    frame = planted(sweep, lambda trial: inferred(6.0, 3.0)(trial, float(rng.normal())))
    (found,) = judge(sweep, frame)
    first, last = frame[frame["epoch"] == 0], frame[frame["epoch"] == LAST]
    for seed, slope in enumerate(found.evidence.values[0]):
        kl = first.loc[first["string_seed"] == seed, "guessing/heldout_kl_bits"].to_numpy()
        family = (first.loc[first["string_seed"] == seed, "model.family"] == "gpt2").to_numpy(dtype=np.float64)
        design = np.stack([kl, family, np.ones(6)], axis=1)
        onsets = last.loc[last["string_seed"] == seed, "phase/memorisation"].to_numpy()
        assert slope == pytest.approx(np.linalg.lstsq(design, onsets, rcond=None)[0][0])


def test_each_procedure_is_taken_at_its_best_rate():
    sweep = grid("mechanism", PROCEDURES, seeds=5)

    def plant(trial: TrialSpec) -> Rows:
        # The larger rate is twice as fast at the higher entropy, and half as fast at the lower.
        is_large, is_high = trial.training.learning_rate == 3e-3, trial.strings.nominal_entropy_bits > 2
        return {0: {}, LAST: {SPEED: 40.0 * (0.5 if is_high else 2.0) ** is_large + trial.string_seed}}

    procedure, rate = judge(sweep, planted(sweep, plant))
    assert procedure.evidence.where == "optimiser sgd"
    np.testing.assert_allclose(procedure.evidence.values[0], [(20 + seed) / (40 + seed) for seed in range(5)])
    assert rate.evidence.where == "learning_rate 0.003"
    np.testing.assert_allclose(rate.evidence.values[0], np.ones(5))
    np.testing.assert_allclose(rate.evidence.values[1], [(20 + seed) / (80 + seed) for seed in range(5)])


def test_an_adapter_is_a_procedure_named_for_what_it_changes():
    cells = [{"strings.entropy_bits": b} | m for m in ({}, {"model.lora": LoraSpec(rank=4)}) for b in (1.0, 4.7)]
    sweep = grid("mechanism", cells, seeds=5, base=TrialSpec(model=ModelSpec(), strings=StringsSpec(length=64)))
    (found,) = judge(sweep, planted(sweep, lambda trial: {0: {}, LAST: {SPEED: 30.0}}))
    assert found.evidence.where == "rank 4"
    assert found.evidence.what == "against the first procedure"


# --- effects -------------------------------------------------------------------------------------------------------

samples = st.lists(st.integers(0, 6).map(float) | st.just(math.inf), min_size=2, max_size=5).map(np.array)


@given(samples, samples)
@settings(max_examples=40, deadline=None)
def test_a_shift_is_that_of_mann_and_whitney_by_counting(first: np.ndarray, second: np.ndarray):
    shift = Shift(first, second)
    pairs = [b - a if math.isfinite(a) or math.isfinite(b) else None for a, b in itertools.product(first, second)]
    num_above = sum(pair is not None and pair > 0.5 for pair in pairs)
    # Every way to deal ranks to the samples, with the number of pairs in order.
    ranks = range(len(first) + len(second))
    counts = [
        sum(b > a for a in ranks if a not in chosen for b in chosen)
        for chosen in itertools.combinations(ranks, len(second))
    ]
    tail = sum(count >= num_above for count in counts) / len(counts)
    assert shift.p_above(0.5) == pytest.approx(min(1.0, 2 * tail))
    for level in (0.5, 0.9, 0.95):
        assert (shift.interval(level).low > 0.5) == (shift.p_above(0.5) <= 1 - level + 1e-12)
        assert (shift.interval(level).high < 0.5) == (shift.p_below(0.5) <= 1 - level + 1e-12)


def test_the_interval_of_a_shift_covers_it_whatever_the_distribution():
    rng = np.random.default_rng(0)
    draws: list[Callable[[], np.ndarray]] = [
        lambda: rng.normal(size=5), lambda: rng.exponential(size=5), lambda: rng.standard_cauchy(size=5)
    ]  # fmt: skip
    for draw in draws:
        covered = [interval.low <= 0.7 <= interval.high for interval in
                   (Shift(draw(), draw() + 0.7).interval(0.95) for _ in range(600))]  # fmt: skip
        # 5 against 5 give 1 - 2 * 4 / 252; the error of 600 draws is 0.007.
        assert np.mean(covered) == pytest.approx(1 - 8 / 252, abs=0.022)


def test_too_few_replicates_bound_nothing_at_a_level_they_cannot_give():
    assert Shift(np.arange(3.0), 100 + np.arange(3.0)).interval(0.95) == UNBOUNDED
    assert Mean(np.array([1.0])).interval(0.95) == UNBOUNDED
    assert Mean(np.array([1.0, math.inf])).p_above(0.0) == 1.0


def test_a_mean_is_that_of_students_test():
    drawn = np.random.default_rng(0).normal(0.4, 1.0, size=7)
    mean, reference = Mean(drawn), stats.ttest_1samp(drawn, 0.1)
    _, p_value = reference
    assert mean.estimate == pytest.approx(np.mean(drawn))
    assert mean.interval(0.9) == pytest.approx(reference.confidence_interval(0.9))
    assert min(mean.p_above(0.1), mean.p_below(0.1)) == pytest.approx(p_value)


def test_the_interval_of_a_mean_of_five_covers_it_where_the_percentile_bootstrap_does_not():
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(2000, 5))
    covered = [mean.interval(0.95) for mean in map(Mean, drawn)]
    assert np.mean([low <= 0 <= high for low, high in covered]) == pytest.approx(0.95, abs=0.015)
    # The percentile interval at the level of 95 %, from 400 resamples of each.
    resampled = drawn[np.arange(400)[:, None, None], rng.integers(5, size=(400, 400, 5))].mean(axis=2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0) & (high >= 0)) < 0.9


def test_equal_values_have_no_error():
    assert Mean(np.full(5, 3.0)).interval(0.95) == (3.0, 3.0)
    assert (Mean(np.full(5, 3.0)).p_above(2.0), Mean(np.full(5, 3.0)).p_above(3.0)) == (0.0, 1.0)


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_seeds_that_would_decide_decide_four_times_of_five(alpha: float):
    rng = np.random.default_rng(0)
    # A large sample stands for what is known of the effect: 0.8 standard deviations.
    known = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    shift, mean = Shift(known, known + 0.8), Mean(known + 0.8)
    for effect, draw in (
        (shift, lambda n: Shift(rng.normal(size=n), rng.normal(size=n) + 0.8)),
        (mean, lambda n: Mean(rng.normal(size=n) + 0.8)),
    ):
        needed = int(effect.seeds_above(0.0, alpha))
        power = np.mean([draw(needed).p_above(0.0) <= alpha for _ in range(300)])
        assert power == pytest.approx(0.8, abs=0.1)
        assert math.isnan(effect.seeds_below(0.0, alpha))
        assert effect.seeds_above(0.7999, alpha) == math.inf

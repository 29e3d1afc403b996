"""From the scores of samples to measurements: of each sample, and of the trial as a whole.

The same functions measure a trial while it trains and again from the ledger's records, so that both give the same
numbers to the last bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int, Int32
from numpy import ndarray

from memray.embedding import read_together
from memray.fact_ranks import measure_facts
from memray.generation import Continuations, nearness, weights_of
from memray.measurement import Measurement
from memray.measures.dependence import dependence
from memray.measures.match_curves import fit_all, within_sample_slope
from memray.measures.match_length import Correctness, extraction_probability
from memray.measures.skew import (
    LARGEST_SHARE,
    describe,
    dispersion_against_geometric,
    expected_max,
    skewness_reproduced,
)
from memray.samples import FOREIGN, HELD_OUT, NATIVE, KnownSample
from memray.scoring import TokenScores
from memray.spec import TrialSpec

# Draws at temperature 1 after which a whole reference may have been seen.
NUM_DRAWS = (1, 10, 100, 1000)

# Samples, and tokens of each, that are permuted at a look before the last one: seconds, where all may take minutes.
MOST_PERMUTED, LONGEST_PERMUTED = 2000, 64

# What tells simulated match lengths and permuted bits from other random numbers of the same seeds.
_SIMULATION_STREAM, _PERMUTATION_STREAM = 14, 15


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """What one pass says of each target of some samples, in order of sample and position.

    Attributes:
        sample: Index of the sample.
        log_prob: ln p(target), nats.
        predicted: Token id of the top prediction, -1 where several share the top.
        rank: Number of tokens with a larger logit than the target; 0 is the top.
        is_right: Whether the target is the one top prediction.
    """

    sample: Int32[ndarray, " targets"]
    log_prob: Float32[ndarray, " targets"]
    predicted: Int32[ndarray, " targets"]
    rank: Int32[ndarray, " targets"]
    is_right: Bool[ndarray, " targets"]

    COLUMNS = ("log_prob", "predicted", "rank", "is_right")

    @staticmethod
    def of(scores: TokenScores, samples: Int[ndarray, " rows"]) -> "SampleScores":
        """The scores of rows, each of which is a sample."""
        sample = samples[scores.string]
        order = np.argsort(sample, kind="stable")
        return SampleScores(
            sample=sample[order].astype(np.int32),
            log_prob=scores.log_prob[order],
            predicted=scores.argmax[order],
            rank=scores.rank[order],
            is_right=scores.margin[order] > 0,
        )

    @staticmethod
    def concatenate(parts: "Sequence[SampleScores]") -> "SampleScores":
        """The scores of different samples together."""
        sample = np.concatenate([part.sample for part in parts])
        order = np.argsort(sample, kind="stable")
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])[order] for name in SampleScores.COLUMNS
        }
        return SampleScores(sample=sample[order], **columns)


def num_match_of(scores: SampleScores, known: Sequence[KnownSample]) -> Int[ndarray, " samples"]:
    """How many tokens of each reference are right before the first that is not."""
    ends = np.searchsorted(scores.sample, np.arange(len(known)), side="right")
    length = np.array([len(sample.reference_ids) for sample in known])
    kept = np.arange(len(scores.sample)) >= np.repeat(ends - length, np.diff(ends, prepend=0))
    return Correctness(scores.is_right[kept], length).num_match


def sample_table(
    epoch: int,
    scores: SampleScores,
    known: Sequence[KnownSample],
    continuations: Continuations | None = None,
    *,
    with_text: bool,
    beside: Mapping[str, pa.Array] = MappingProxyType({}),
) -> pa.Table:
    """One row a sample: what is known of it, of each target what the pass said, and what was generated.

    The columns `collapse/…` and `similarity/…` say one thing of all native samples together, the same in each row. They
    come from hidden states, which no record keeps: `remeasure_samples` reads them here, and computes all else again.

    Args:
        with_text: Whether prefix and reference stand there too; else they are null.
        beside: More columns.
    """
    told = continuations or Continuations({}, {})
    near = {index: nearness(known[index].text.reference.strip(), text.strip()) for index, text in told.text.items()}
    generated = {
        "continuation": pa.array([told.text.get(index) for index in range(len(known))], type=pa.string()),
        "generated_match": pa.array([told.num_match.get(index) for index in range(len(known))], type=pa.int32()),
        **{
            name: pa.array([near.get(index, {}).get(name) for index in range(len(known))], type=pa.float64())
            for name in ("rouge_l", "levenshtein")
        },
    }
    ends = np.searchsorted(scores.sample, np.arange(len(known)), side="right")
    offsets = pa.array(np.concatenate([[0], ends]), type=pa.int32())
    texts = {
        "prefix": [sample.text.prefix if with_text else None for sample in known],
        "reference": [sample.text.reference if with_text else None for sample in known],
    }
    return pa.table(
        {
            "epoch": pa.array(np.full(len(known), epoch, dtype=np.int32)),
            "sample": pa.array(np.arange(len(known), dtype=np.int32)),
            "role": pa.array([sample.role for sample in known]).dictionary_encode(),
            "row": pa.array([sample.place for sample in known], type=pa.int64()),
            "prompt_tokens": pa.array([len(sample.prompt_ids) for sample in known], type=pa.int32()),
            "reference_tokens": pa.array([len(sample.reference_ids) for sample in known], type=pa.int32()),
            **{name: pa.array(values, type=pa.string()) for name, values in texts.items()},
            **{
                name: pa.ListArray.from_arrays(offsets, pa.array(getattr(scores, name)))
                for name in SampleScores.COLUMNS
            },
            **generated,
            **beside,
        }
    )


@dataclass(frozen=True)
class ScoredSamples:
    """The samples of one epoch as a table of them says.

    Attributes:
        role: Of each sample.
        num_before: Targets of each sample that stand before its reference: 0 where references alone are trained.
        num_reference: Targets of its reference: all its tokens.
    """

    epoch: int
    role: ndarray
    num_before: Int[ndarray, " samples"]
    num_reference: Int[ndarray, " samples"]
    log_prob: Float32[ndarray, " targets"]
    predicted: Int32[ndarray, " targets"]
    is_right: Bool[ndarray, " targets"]

    @staticmethod
    def read(table: pa.Table) -> "list[ScoredSamples]":
        """The epochs of a table, ascending."""
        found = []
        epochs = table["epoch"].to_numpy()
        for epoch in np.unique(epochs):
            own = table.filter(pa.array(epochs == epoch)).combine_chunks()
            counts = np.diff(own["log_prob"].combine_chunks().offsets.to_numpy())
            num_reference = own["reference_tokens"].to_numpy()
            flat = {name: own[name].combine_chunks().flatten() for name in ("log_prob", "predicted", "is_right")}
            columns = {name: values.to_numpy(zero_copy_only=False) for name, values in flat.items()}
            role = np.array(own["role"].to_pylist())
            found.append(ScoredSamples(int(epoch), role, counts - num_reference, num_reference, **columns))
        return found

    def reference(self, chosen: Bool[ndarray, " samples"]) -> tuple[Correctness, Float32[ndarray, " tokens"]]:
        """Of the chosen samples: whether each token of the reference is right, and its log probability."""
        counts = self.num_before + self.num_reference
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        kept = np.repeat(chosen, counts) & (within >= np.repeat(self.num_before, counts))
        return Correctness(self.is_right[kept], self.num_reference[chosen]), self.log_prob[kept]


def measure_samples(spec: TrialSpec, table: pa.Table) -> Measurement:
    """The measurement of one epoch from its table."""
    (scored,) = ScoredSamples.read(table)
    compared = spec.probes.compared_strings
    index = np.arange(len(scored.role))
    groups = {
        "": (scored.role == NATIVE) & (index < (compared or len(index))),
        "heldout_": scored.role == HELD_OUT,
        "foreign_": scored.role == FOREIGN,
    }
    metrics: dict[str, float] = {}
    for prefix, chosen in groups.items():
        if chosen.any():
            metrics |= {_prefixed(key, prefix): value for key, value in _measured(scored, chosen).items()}
    metrics["match/tie_rate"] = float((scored.predicted < 0).mean())
    native, _ = scored.reference(groups[""])
    metrics |= _shape(spec, native, scored.epoch)
    if scored.epoch:
        metrics |= _dependence(spec, native, scored.epoch)
    metrics |= _generated(scored, table)
    metrics |= _by_prefix_length(native, spec.probes.prefix_lengths)
    metrics |= read_together(table)
    if spec.probes.facts is not None:
        told = table["object_ranks"].to_pylist()
        ranks = {index: each for index, each in enumerate(told) if each is not None}
        metrics |= measure_facts(spec, scored.role, table["row"].to_numpy(), ranks)
    defined = {key: value for key, value in metrics.items() if np.isfinite(value)}
    return Measurement(spec.trial_id(), 0, scored.epoch, defined, samples=table)


def _generated(scored: ScoredSamples, table: pa.Table) -> dict[str, float]:
    """How near what was generated comes to the references, of all native samples; and whether match lengths hold."""
    native = scored.role == NATIVE
    num_match = scored.reference(native)[0].num_match
    metrics = {}
    for name in ("rouge_l", "levenshtein"):
        values = table[name].to_numpy()[native]
        if (chosen := np.flatnonzero(np.isfinite(values))).size:
            metrics[f"generation/{name}"] = float(weights_of(num_match, chosen) @ values[chosen])
    found = table["generated_match"].to_pandas().to_numpy(dtype=np.float64)[native]
    if (checked := np.flatnonzero(np.isfinite(found))).size:
        metrics["generation/disagreement"] = float(np.mean(found[checked] != num_match[checked]))
    return metrics


def _prefixed(key: str, prefix: str) -> str:
    group, _, name = key.partition("/")
    return f"{group}/{prefix}{name}"


def _measured(scored: ScoredSamples, chosen: Bool[ndarray, " samples"]) -> dict[str, float]:
    """What is said of any group of samples."""
    correctness, log_prob = scored.reference(chosen)
    num_match, num_samples = correctness.num_match, correctness.num_samples
    measured: dict[str, float] = describe(num_match, correctness.length)
    small = np.array([max(1, num_samples // (2 * LARGEST_SHARE)), max(1, num_samples // LARGEST_SHARE)])
    half, fifth = expected_max(num_match, small)
    ends = np.cumsum(correctness.length)[:-1]
    log_probs = np.array([each.sum(dtype=np.float64) for each in np.split(log_prob, ends)])
    extracted = {
        f"match/extracted_{number}": float(extraction_probability(log_probs, number).mean()) for number in NUM_DRAWS
    }
    return (
        measured
        | extracted
        | {
            "match/expected_max": float(fifth),
            "match/expected_max_rise": float(fifth - half),
            "recall/token_accuracy": float(correctness.is_right.mean()),
            "recall/nll_nats": -float(np.mean(log_prob, dtype=np.float64)),
        }
    )


def _shape(spec: TrialSpec, correctness: Correctness, epoch: int) -> dict[str, float]:
    """What the match lengths of the native samples look like, beside curves that could have made them.

    Simulations come from the trial's seeds and the epoch, so that the same records give the same numbers.
    """
    num_match, length = correctness.num_match, correctness.length
    rng = np.random.default_rng([_SIMULATION_STREAM, spec.string_seed, spec.model_seed, spec.order_seed, epoch])
    fits = fit_all(num_match, length)
    metrics = {f"match/aic_{name}": each.aic for name, each in fits.items()}
    for name, against in dispersion_against_geometric(num_match, length, rng).items():
        metrics[f"match/{name}_beyond_geometric"] = against.observed - against.simulated_mean
        metrics[f"match/{name}_geometric_p_value"] = against.p_value
    reproduced = skewness_reproduced(num_match, length, fits["beta_geometric"], rng)
    metrics["match/skewness_low"], metrics["match/skewness_high"] = reproduced.simulated
    metrics["match/skewness_reproduced"] = float(reproduced.is_reproduced)
    slope = within_sample_slope(correctness)
    return metrics | {
        "match/within_sample_slope": slope.slope,
        "match/within_sample_slope_error": slope.standard_error,
    }


def _by_prefix_length(correctness: Correctness, prefix_lengths: Sequence[int]) -> dict[str, float]:
    """How many tokens are recited after the first few of a reference are given, by how many.

    Of the references that go on beyond the most that are given, and up to as many tokens for each number of them: what
    differs is the prefix, and with it where in a reference these tokens stand.
    """
    if not prefix_lengths:
        return {}
    horizon = correctness.length - prefix_lengths[-1]
    compared = np.flatnonzero(horizon > 0)
    if not len(compared):
        return {}
    begins = (np.cumsum(correctness.length) - correctness.length)[compared]
    runs = correctness.run_lengths()
    metrics = {"prefix/compared": float(len(compared))}
    for given in prefix_lengths:
        recited = np.minimum(runs[begins + given], horizon[compared])
        metrics[f"prefix/match_{given}"] = float(recited.mean())
        metrics[f"prefix/whole_{given}"] = float((recited == horizon[compared]).mean())
    return metrics


def check_prefix_lengths(spec: TrialSpec, known: Sequence[KnownSample]) -> None:
    """Refuses a trial of which no reference goes on beyond the most that `_by_prefix_length` gives: it would say
    nothing.

    Raises:
        ValueError: If so.
    """
    given, compared = spec.probes.prefix_lengths, spec.probes.compared_strings or len(known)
    longest = max(len(sample.reference_ids) for sample in known[:compared] if sample.role == NATIVE)
    if given and longest <= given[-1]:
        raise ValueError(
            f"a reference must go on beyond the most of probes.prefix_lengths, {given[-1]}, but the longest of those "
            f"that are compared has {longest} tokens; give fewer tokens, or take longer references"
        )


def _dependence(spec: TrialSpec, correctness: Correctness, epoch: int) -> dict[str, float]:
    """Whether right tokens go together, beyond what samples and positions explain.

    Asked at every look, for in the end all of them may be right, which shows nothing; before the last one of some
    samples and of the beginnings of their references, because training waits for it.
    """
    rng = np.random.default_rng([_PERMUTATION_STREAM, spec.string_seed, spec.model_seed, spec.order_seed, epoch])
    bits, _ = correctness.as_matrix()
    length = correctness.length
    if epoch < spec.num_epochs:
        bits, length = bits[:MOST_PERMUTED, :LONGEST_PERMUTED], np.minimum(length[:MOST_PERMUTED], LONGEST_PERMUTED)
        bits = bits[:, : length.max()]
    found = dependence(bits, length, rng)
    excesses = {f"lag_{lag}": each for lag, each in found.lags.items()} | {"history": found.history}
    metrics = {}
    for name, each in excesses.items():
        metrics[f"dependence/{name}_bits"] = each.excess
        metrics[f"dependence/{name}_p_value"] = each.p_value
    return metrics


def remeasure_samples(spec: TrialSpec, table: pa.Table) -> list[Measurement]:
    """Every measure of a trial, computed again from its records; what embeddings said is read (see `sample_table`)."""
    epochs = table["epoch"].to_numpy()
    return [measure_samples(spec, table.filter(pa.array(epochs == epoch))) for epoch in np.unique(epochs)]

"""The claims that studies are judged on: what each says, what it is judged by, and how large an effect must be.

By which rule, `verdicts` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from memray.report import SPEED
from memray.report.estimands import (
    ALPHABET_SIZE,
    ENTROPY,
    Estimand,
    in_each_cell,
    interaction_with_entropy,
    onset_by_in_context_inference,
    over,
    over_alphabets_at_entropy,
    over_compressibility,
    over_num_strings,
    pretrained_and_untrained,
    short_prefix_against_full,
    source_against_foreign,
    together,
)
from memray.report.replicates import (
    accuracy_at_onset,
    accuracy_beyond_robust,
    difference,
    extractable_beyond_robust,
    first,
    last,
    plateau,
)
from memray.report.sample_estimands import (
    MEAN,
    TAIL,
    foreign_against_native,
    free_against_frozen,
    growth_after_loss,
    inside_fitted_interval,
    over_corpus_size,
    over_option,
    skew_with_collapse,
    where_whole,
)
from memray.report.samples_seen import FEW_WHOLE, HALF_WHOLE
from memray.report.sequence_estimands import (
    BEYOND_HELDOUT,
    FORGETTING,
    at_end_of_each,
    carried_against_fresh_weights,
    memorising_against_fresh_strings,
    over_stages,
    retention_curves,
    savings_on_relearning,
)

# What is claimed of the effect: that it lies above or below the smallest effect of interest, within it, beyond it on
# either side, or anywhere but above it.
Direction = Literal["rises", "falls", "stays", "moves", "does not rise"]
Subject = Literal["strings", "sequences", "corpora"]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim, and how it is judged.

    Attributes:
        id: As it is cited.
        sentence: What is claimed.
        source: Who says so.
        studies: The sweeps that were made to judge it.
        estimand: What it is judged by.
        measured: What the effect is, in words.
        direction: What is claimed of the effect.
        smallest: The smallest effect of interest, at least 0.
        unit: Of the effect; "relative" is a change as a share of the first level.
        about: What is trained in the cells that it sees: strings, strings one after another, or the samples of a
            corpus.
    """

    id: str
    sentence: str
    source: str
    studies: tuple[str, ...]
    estimand: Estimand
    measured: str
    direction: Direction
    smallest: float
    unit: str
    about: Subject = "strings"

    @property
    def is_relative(self) -> bool:
        return self.unit == "relative"

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest effect of interest downwards and upwards, on the scale on which the effect is computed."""
        if self.is_relative:
            return math.log1p(-self.smallest), math.log1p(self.smallest)
        return -self.smallest, self.smallest


RANDOM_STRINGS = "arXiv 2407.19262"
SKEWED = "arXiv 2502.01187"
SPEED_TEXT = f"change of {SPEED}"
FEW_WHOLE_TEXT = f"where {FEW_WHOLE:.0%} of the samples are recited whole (or at the last epoch, where fewer are)"
GROWTH_TEXT = "growth of the tail of match lengths from the probe epoch from which on the loss is flat to the last one"
TOP_SHARE = "match/top_share_beyond_geometric"
TOP_SHARE_TEXT = (
    "share of all matched tokens that the top 1 % of samples hold, less that of a geometric distribution with the same "
    f"references; {FEW_WHOLE_TEXT}"
)

CLAIMS = (
    Claim(
        id="A1", sentence="Memorisation comes in two phases, guessing and recall.", source=RANDOM_STRINGS,
        studies=("dynamics",), estimand=in_each_cell(plateau),
        measured="epochs from the distribution's being learned to the onset of memorisation; where it was not learned "
        "although memorisation set in, it counts as learned after the last epoch",
        direction="rises", smallest=2.0, unit="epochs",
    ),
    Claim(
        id="A2", sentence="The two phases appear in every family.", source=RANDOM_STRINGS,
        studies=("model_family",), estimand=in_each_cell(plateau), measured="as A1, in each family",
        direction="rises", smallest=2.0, unit="epochs",
    ),
    Claim(
        id="A3", sentence="Strings over smaller alphabets are memorised later.", source=RANDOM_STRINGS,
        studies=("alphabet", "schedule"), estimand=over(ALPHABET_SIZE, kinds=("iid",)),
        measured=f"{SPEED_TEXT} from the smallest to the largest alphabet",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A4", sentence="Strings over smaller alphabets are guessed better.", source=RANDOM_STRINGS,
        studies=("alphabet",),
        estimand=together(
            over(ALPHABET_SIZE, first("string/guesser_accuracy"), what="accuracy of the best guesser"),
            over(ALPHABET_SIZE, accuracy_at_onset, what="token accuracy at onset"),
        ),
        measured="difference of accuracy from the smallest to the largest alphabet",
        direction="falls", smallest=0.05, unit="of tokens",
    ),
    Claim(
        id="A5", sentence="Strings of higher entropy are memorised faster, with the alphabet held.",
        source=RANDOM_STRINGS, studies=("entropy", "schedule"), estimand=over(ENTROPY, kinds=("iid",)),
        measured=f"{SPEED_TEXT} from the lowest to the highest entropy",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A6", sentence="At equal entropy the size of the alphabet has no effect.", source=RANDOM_STRINGS,
        studies=("alphabet_at_entropy",), estimand=over_alphabets_at_entropy,
        measured=f"{SPEED_TEXT} from the smallest to the largest alphabet at equal entropy and skew (or uniform)",
        direction="stays", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A7", sentence="More predictive short prefixes do not speed memorisation.", source=RANDOM_STRINGS,
        studies=("conditional_entropy",), estimand=over("strings.conditional_entropy_bits", kinds=("markov",)),
        measured=f"{SPEED_TEXT} from the most to the least predictive prefixes, at a fixed marginal",
        direction="does not rise", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A8", sentence="Strings that compress better are not memorised faster for it.", source=RANDOM_STRINGS,
        studies=("conditional_entropy", "structure"), estimand=over_compressibility,
        measured=f"{SPEED_TEXT} from the most to the least compressible strings of one entropy and skew",
        direction="does not rise", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A9", sentence="The effect of entropy survives structure.", source="a next check of " + RANDOM_STRINGS,
        studies=("structure",), estimand=over(ENTROPY, kinds=("repeated", "hierarchical")),
        measured=f"{SPEED_TEXT} from the lowest to the highest entropy, among strings of one structure and so of "
        "equally many novel symbols",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A10", sentence="Untrained models memorise more slowly.", source=RANDOM_STRINGS, studies=("pretraining",),
        estimand=pretrained_and_untrained,
        measured=f"{SPEED_TEXT} from pre-trained to untrained models, up to the shorter horizon of the two",
        direction="rises", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A11", sentence="Better inference in context shortens the guessing phase.",
        source="open question 3 of " + RANDOM_STRINGS, studies=("in_context",),
        estimand=onset_by_in_context_inference,
        measured="slope of onset on the held-out KL before training, within a size and family, string by string",
        direction="rises", smallest=0.0, unit="epochs a bit",
    ),
    Claim(
        id="A12", sentence="Tokens are memorised in no order of position.", source=RANDOM_STRINGS, studies=("order",),
        estimand=in_each_cell(last("order/spearman")),
        measured="Spearman correlation of a token's position and the epoch at which it is memorised",
        direction="stays", smallest=0.1, unit="of 1",
    ),
    Claim(
        id="A13", sentence="Contiguous measures understate recall.", source=RANDOM_STRINGS, studies=("measures",),
        estimand=in_each_cell(extractable_beyond_robust),
        measured="50/50 extractability less robust recall, at the probe epoch whose robust recall, within 0.25–0.9, is "
        "nearest to one half",
        direction="falls", smallest=0.1, unit="of 1",
    ),
    Claim(
        id="A13", sentence="Raw accuracy overstates recall.", source=RANDOM_STRINGS, studies=("measures",),
        estimand=in_each_cell(accuracy_beyond_robust),
        measured="token accuracy less robust recall (at least 0), mean over the epochs before onset",
        direction="rises", smallest=0.1, unit="of 1",
    ),
    Claim(
        id="A14", sentence="A short local prefix suffices where the distribution is kept.", source=RANDOM_STRINGS,
        studies=("local_prefix", "context"), estimand=short_prefix_against_full,
        measured="recall from the last 5–10 % of the prefix after fresh symbols of the source, less that from the full "
        "prefix",
        direction="stays", smallest=0.05, unit="of tokens",
    ),
    Claim(
        id="A15", sentence="The distribution of the context matters.", source=RANDOM_STRINGS, studies=("context",),
        estimand=source_against_foreign,
        measured="recall from few local tokens after fresh symbols of the source, less that after foreign ones",
        direction="rises", smallest=0.05, unit="of tokens",
    ),
    Claim(
        id="A16", sentence="The effect of entropy depends on the procedure.",
        source="open question 1 of " + RANDOM_STRINGS, studies=("mechanism",), estimand=interaction_with_entropy,
        measured="ratio of T at the highest to T at the lowest entropy: change from the first procedure, each at its "
        "best rate; unknown unless both were reached",
        direction="moves", smallest=0.10, unit="relative",
    ),
    Claim(
        id="A17", sentence="More strings are memorised more slowly.", source=RANDOM_STRINGS, studies=("dataset_size",),
        estimand=over_num_strings,
        measured=f"{SPEED_TEXT}, of the strings that all share, from fewest to most strings, up to the shortest "
        "horizon among them",
        direction="rises", smallest=0.10, unit="relative",
    ),
    Claim(
        id="B1", sentence="Later strings are memorised faster.", source=RANDOM_STRINGS, studies=("sequential",),
        estimand=together(over_stages, carried_against_fresh_weights), about="sequences",
        measured=f"{SPEED_TEXT} from the first stage to the last ones, of several stages their median; and from fresh "
        "weights to those that the stages before have left, for the same strings",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="B2", sentence="Earlier strings are forgotten.", source=RANDOM_STRINGS,
        studies=("sequential", "forgetting"), estimand=at_end_of_each(FORGETTING), about="sequences",
        measured="robust recall of each string at the end of its stage less that at the end of the last one, mean over "
        "the strings of earlier stages",
        direction="rises", smallest=0.1, unit="of 1",
    ),
    Claim(
        id="B3", sentence="Recall is forgotten along one curve: linear, exponential, a power or saturating.",
        source="a next check of " + RANDOM_STRINGS, studies=("forgetting",), estimand=retention_curves,
        measured="AIC of the curve that is named, over the age in optimiser steps, less the least of the other curves",
        direction="falls", smallest=10.0, unit="of AIC", about="sequences",
    ),
    Claim(
        id="B4", sentence="Forgotten strings fall to the level of held-out ones.",
        source="a follow-up of " + RANDOM_STRINGS, studies=("forgetting",), estimand=at_end_of_each(BEYOND_HELDOUT),
        measured="loss on the older half of the earlier strings less that on held-out ones, after the last stage",
        direction="stays", smallest=0.1, unit="bits a token", about="sequences",
    ),
    Claim(
        id="B5", sentence="Relearning a string is faster than learning a new one.",
        source="this project", studies=("relearning",), estimand=savings_on_relearning,
        measured=f"savings: 1 less {SPEED} of a stage that is visited again as a share of that of a new one in its "
        "place, after the same strings",
        direction="rises", smallest=0.1, unit="of 1", about="sequences",
    ),
    Claim(
        id="B6", sentence="Acceleration needs strings that were memorised, not merely their alphabet.",
        source="mechanism 3 of " + RANDOM_STRINGS, studies=("transfer",), estimand=memorising_against_fresh_strings,
        measured=f"{SPEED_TEXT} in the last stage, from stages of fresh strings that never came again to as many "
        "steps on strings that were memorised",
        direction="falls", smallest=0.10, unit="relative", about="sequences",
    ),
    Claim(
        id="C1", sentence="Memorisation grows with training, after the loss is flat.", source=SKEWED,
        studies=("duration",), estimand=growth_after_loss, about="corpora", measured=GROWTH_TEXT,
        direction="rises", smallest=1.0, unit="tokens",
    ),
    Claim(
        id="C2", sentence="A few samples hold most of what is memorised.", source=SKEWED,
        studies=("duration",), about="corpora", estimand=in_each_cell(where_whole(TOP_SHARE)), measured=TOP_SHARE_TEXT,
        direction="rises", smallest=0.05, unit="of tokens",
    ),
    Claim(
        id="C3", sentence="Smaller sets are memorised faster.", source=SKEWED, studies=("corpus_size",),
        estimand=over_corpus_size, about="corpora",
        measured="match lengths of the samples that all share, change from the smallest to the largest set",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="C4", sentence="A few foreign samples change the tail of the others.", source=SKEWED,
        studies=("composition",), estimand=foreign_against_native, about="corpora",
        measured="rank-biserial effect over the samples that both mixes train, of foreign samples against as many "
        "native ones, on mean match lengths over training seeds",
        direction="moves", smallest=0.1, unit="rank-biserial",
    ),
    Claim(
        id="C5", sentence="The skew follows from token generation.", source=SKEWED, studies=("duration",),
        estimand=inside_fitted_interval, about="corpora",
        measured="place of the observed skewness in the 95 % interval of the fitted beta-geometric curve, whose ends "
        f"are -1 and 1; {FEW_WHOLE_TEXT}",
        direction="stays", smallest=1.0, unit="half-widths",
    ),
    Claim(
        id="C6", sentence="Right tokens are nearly independent of each other.", source=SKEWED,
        studies=("duration", "reasoning"), about="corpora",
        estimand=together(
            in_each_cell(where_whole("dependence/lag_1_bits", HALF_WHOLE), "neighbours"),
            in_each_cell(where_whole("dependence/history_bits", HALF_WHOLE), "a token and all before it"),
        ),
        measured="mutual information beyond what samples and positions explain, where half of the samples are recited "
        "whole (or at the last epoch, where fewer are)",
        direction="stays", smallest=0.01, unit="bits",
    ),
    Claim(
        id="C7", sentence="Small probes miss the worst cases.", source=SKEWED, studies=("duration", "probe_size"),
        estimand=in_each_cell(where_whole("match/expected_max_rise")), about="corpora",
        measured=f"E[max_z] at a fifth of the samples less that at a tenth of them, {FEW_WHOLE_TEXT}",
        direction="rises", smallest=1.0, unit="tokens",
    ),
    Claim(
        id="C8", sentence="More similar samples are memorised more.", source="the summary of " + SKEWED,
        studies=("similarity",), about="corpora",
        estimand=over_option("prefix_overlap", ((MEAN, "mean match length"),), ("low", "high")),
        measured="mean match length from low to high overlap of the prefixes",
        direction="rises", smallest=0.10, unit="relative",
    ),
    Claim(
        id="C9", sentence="Similar prefixes with diverse continuations are memorised less.",
        source="remark 2.7 of " + SKEWED, studies=("similarity",), about="corpora",
        estimand=over_option(
            "continuation_overlap", ((MEAN, "mean match length"),), ("high", "low"), held=("prefix_overlap", "high")
        ),
        measured="mean match length from alike to diverse continuations, of prefixes that are alike",
        direction="falls", smallest=0.10, unit="relative",
    ),
    Claim(
        id="C10", sentence="Collapse of embeddings drives the skew: it differs where they are frozen.",
        source="open question 1 of " + SKEWED, studies=("similarity",), estimand=free_against_frozen, about="corpora",
        measured="skewness of the match lengths with free input embeddings less that with frozen ones, "
        f"{FEW_WHOLE_TEXT}",
        direction="moves", smallest=0.0, unit="of skewness",
    ),
    Claim(
        id="C10", sentence="Skew goes with the collapse of embeddings while a trial trains.",
        source="open question 1 of " + SKEWED, studies=("similarity",), about="corpora", estimand=skew_with_collapse,
        measured="rank correlation over probe epochs of the effective rank of the samples' embeddings and the skewness "
        "of the match lengths, with the mean match length held",
        direction="falls", smallest=0.0, unit="of 1",
    ),
    Claim(
        id="C11", sentence="Memorisation reaches facts, not only their wording.",
        source="open question 2 of " + SKEWED, studies=("facts",), about="corpora",
        estimand=in_each_cell(difference("facts/rank_unseen_controls", "facts/rank_unseen")),
        measured="rank of the object under templates in which a fact was not told, of facts that were never told less "
        "that of trained ones",
        direction="rises", smallest=0.0, unit="ranks",
    ),
    Claim(
        id="C12", sentence="Token frequency and diversity shape the skew.", source="a next check of " + SKEWED,
        studies=("token_frequency", "diversity"), about="corpora",
        estimand=together(
            *(
                over_option(
                    option,
                    (("match/gini", "Gini"), (TAIL, "E[max_z]"), ("match/top_share", "top share")),
                    at=where_whole,
                )
                for option in ("skew", "num_templates")
            )
        ),
        measured=f"skew of the match lengths, change from the first arm to the last; {FEW_WHOLE_TEXT}",
        direction="moves", smallest=0.10, unit="relative",
    ),
    Claim(
        id="C13", sentence="Memorisation grows after the loss is flat, whatever the architecture and the objective.",
        source="a next check of " + SKEWED, studies=("architecture", "objective"), estimand=growth_after_loss,
        about="corpora", measured=f"as C1, in each: {GROWTH_TEXT}",
        direction="rises", smallest=1.0, unit="tokens",
    ),
    Claim(
        id="C13", sentence="A few samples hold most of it, whatever the architecture and the objective.",
        source="a next check of " + SKEWED, studies=("architecture", "objective"),
        estimand=in_each_cell(where_whole(TOP_SHARE)), about="corpora", measured=f"as C2, in each: {TOP_SHARE_TEXT}",
        direction="rises", smallest=0.05, unit="of tokens",
    ),
)  # fmt: skip

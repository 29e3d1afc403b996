"""What a sweep has shown, as one table: a row a cell, a sentence a trend, and what looks unhealthy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from memray.measures.statistics import holm, jonckheere_terpstra
from memray.report import (
    OF_LAST_STAGE,
    SEEDS,
    SPEED,
    Cell,
    cells_of,
    column,
    factors,
    has_corpus,
    has_curriculum,
    interval_text,
    is_number,
    measured_ends,
    spec_values,
    value_text,
)
from memray.report.replicates import last_value
from memray.spec import TrialSpec
from memray.sweep import Sweep

SHOWN = (SPEED, "phase/memorisation", "recall/robust", "recall/token_accuracy")
# Of a corpus.
SHOWN_OF_SAMPLES = (
    "match/mean",
    "match/q99",
    "match/expected_max",
    "match/max",
    "match/heldout_mean",
    "recall/nll_nats",
)
# Beside them, where strings were trained one after another.
SHOWN_OF_SEQUENCES = ("sequence/recall_seen", "sequence/forgetting")

SIGNIFICANT = 0.05
# With fewer a level, a trend is shown with a reservation (protocol, section 3).
ENOUGH_REPLICATES = 5
PERMUTATIONS = 9_999
# Levels of a factor that a sentence names one by one.
NAMED_LEVELS = 12

MAX_TIE_RATE = 0.01
MAX_EPOCHS_BELOW_GUESSING = 5.0
# What the planted guessers of the robust measure stay under: held-out strings above it are remembered.
MAX_HELDOUT_MEMORY = 0.01


def result_table(sweep: Sweep, frame: pd.DataFrame) -> list[RenderableType]:
    """The page that a finished sweep prints: the table of its cells, a sentence a trend, and warnings."""
    sentences = [Text(trend.sentence()) for trend in trends(sweep, frame)]
    warnings = [Text(f"warning: {sentence}", style="yellow") for sentence in health_warnings(sweep, frame).values()]
    return [_table(sweep, frame), *sentences, *warnings]


def shown_keys(sweep: Sweep) -> tuple[str, ...]:
    """The measures that the table shows of a sweep."""
    if has_corpus(sweep):
        return SHOWN_OF_SAMPLES
    return SHOWN + SHOWN_OF_SEQUENCES if has_curriculum(sweep) else SHOWN


def cell_table(sweep: Sweep, frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell, in the sweep's order, by cell id.

    Columns are the varying fields (seeds apart), `replicates` (with results), `censored` (those that never reached
    `phase/epochs_to_robust_50`), and the median over replicates of that, of the onset of memorisation, and of the
    recall at the last epoch, each with the ends of its interval as `<key>/low` and `<key>/high` (see
    `median_interval`). A censored median is nan, a censored end infinite; what no replicate defines is nan in all
    three. Of a curriculum all is of its last stage (see `of_last_stage`), and recall of all strings trained so far
    and forgetting stand beside it.
    """
    names = _varying(sweep)
    rows = {}
    for cell_id, cell in cells_of(sweep, frame).items():
        params = cell.spec.params()
        row: dict[str, Any] = {name: params[name] for name in names}
        row |= {"replicates": len(cell.last), "censored": _num_censored(cell)}
        for key in shown_keys(sweep):
            row |= dict(zip((key, f"{key}/low", f"{key}/high"), cell.centre(key).numbers, strict=True))
        rows[cell_id] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("cell_id")


def _table(sweep: Sweep, frame: pd.DataFrame) -> Table:
    names = _varying(sweep)
    cells = list(cells_of(sweep, frame).values())
    table = Table(
        title=sweep.name,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for name in (*names, "replicates", "censored", *shown_keys(sweep)):
        # Folded, never cut: an interval without its end would be another interval.
        table.add_column(Text(_broken(name)), justify="right", overflow="fold")
    for cell in cells:
        params, number, planned = cell.spec.params(), len(cell.last), len(cell.trials)
        row = [value_text(params[name]) for name in names]
        row += [f"{number}" if number == planned else f"{number} of {planned}", f"{_num_censored(cell)}"]
        row += [str(cell.centre(key)) for key in shown_keys(sweep)]
        table.add_row(*map(Text, row))
    interval = interval_text([cell.present for cell in cells])
    caption = f"Medians over replicates{f' [{interval}]' if interval else ''}; recall is that of the last epoch."
    if any(_num_censored(cell) for cell in cells):
        caption += " Censored: never reached; counted as the latest, and shown as > the last epoch."
    if has_curriculum(sweep):
        caption += f" {OF_LAST_STAGE.capitalize()}."
    table.caption = Text(caption)
    return table


def _varying(sweep: Sweep) -> list[str]:
    return [name for name in sweep.varying() if name not in SEEDS]


def _num_censored(cell: Cell) -> int:
    return int(np.isnan(cell.values(SPEED)).sum())


def _broken(name: str, width: int = 10) -> str:
    """A key on several lines, broken after its separators."""
    lines = [""]
    for part in re.findall(r"[^./_]+[./_]?", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


# --- trends ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trend:
    """A test of `phase/epochs_to_robust_50` for a trend over one field, all others held.

    Attributes:
        factor: The field.
        levels: Its values, ascending.
        held: The sweep's other fields, at the values that they are held at; an entropy of None is a uniform source.
        replicates: Replicates of each level.
        statistic: Jonckheere and Terpstra's count of pairs in ascending order.
        num_pairs: Pairs of replicates of two levels; a count of half of them is no trend.
        p_value: Two-sided, by permutation.
        adjusted_p_value: The same after Holm's adjustment for all trends of the sweep.
        notes: What a reader should know before believing it.
    """

    factor: str
    levels: tuple[float, ...]
    held: Mapping[str, Any]
    replicates: tuple[int, ...]
    statistic: float
    num_pairs: int
    p_value: float
    adjusted_p_value: float
    notes: tuple[str, ...]

    @property
    def direction(self) -> Literal["falls", "rises", "stays level"]:
        """Where the epochs go as the field rises, significantly or not."""
        if self.statistic == self.num_pairs / 2:
            return "stays level"
        return "falls" if self.statistic < self.num_pairs / 2 else "rises"

    def sentence(self) -> str:
        """The trend in plain words; one that may be chance is called undecided."""
        levels = [value_text(level) for level in self.levels]
        if len(levels) > NAMED_LEVELS:
            levels = [f"{len(levels)} levels from {levels[0]} to {levels[-1]}"]
        over = f"as {self.factor} rises over {', '.join(levels)}"
        if self.held:
            over += f", at {', '.join(f'{name} = {value_text(value)}' for name, value in self.held.items())},"
        p_text = "p < 0.001" if self.adjusted_p_value < 0.001 else f"p = {self.adjusted_p_value:.2g}"
        fewest, most = min(self.replicates), max(self.replicates)
        number = f"{fewest} to {most} replicates" if fewest < most else f"{most} replicate{'s' if most > 1 else ''}"
        basis = f"Jonckheere–Terpstra, Holm-adjusted {p_text}, {number} a level"
        if self.adjusted_p_value <= SIGNIFICANT:
            claim = f"{SPEED} {self.direction} {over} ({basis})"
        else:
            claim = f"undecided whether {SPEED} moves {over} ({basis}; here it {self.direction})"
        return "; ".join([claim.replace(", (", " ("), *self.notes])


def trends(sweep: Sweep, frame: pd.DataFrame) -> list[Trend]:
    """Every trend that a sweep can show: of each numeric field, among the cells that are equal in all others.

    What follows from another field (the entropy of a uniform source) is no field of its own, and cells between
    which two fields move belong to no trend.
    """
    names = factors(sweep)
    cells = cells_of(sweep, frame).values()
    found = []
    for factor in names:
        for held, levels in _groups(cells, factor):
            found.append(_trend(factor, levels, {name: held[name] for name in names if name != factor}))
    adjusted = holm(np.array([trend.p_value for trend in found], dtype=np.float64))
    return [replace(trend, adjusted_p_value=float(p)) for trend, p in zip(found, adjusted, strict=True)]


def _groups(cells: Iterable[Cell], factor: str) -> list[tuple[dict[str, Any], dict[float, list[Cell]]]]:
    """Cells equal in all but the factor, by its level, ascending; groups in which two levels have results."""
    groups: dict[tuple[Any, ...], dict[float, list[Cell]]] = {}
    for cell in cells:
        # The level is the nominal one: a uniform source is the most random of all, not one without an entropy.
        level = cell.spec.params()[factor]
        if is_number(level) and len(cell.values(SPEED)):
            held = tuple((name, value) for name, value in spec_values(cell.spec).items() if name != factor)
            groups.setdefault(held, {}).setdefault(float(level), []).append(cell)
    return [(dict(held), dict(sorted(levels.items()))) for held, levels in groups.items() if len(levels) > 1]


def _last_stages(cells: Sequence[Cell]) -> list[str]:
    return [OF_LAST_STAGE] if any(cell.spec.curriculum for cell in cells) else []


def _trend(factor: str, levels: Mapping[float, Sequence[Cell]], held: Mapping[str, Any]) -> Trend:
    values = [np.concatenate([cell.values(SPEED) for cell in cells]) for cells in levels.values()]
    sizes = [len(each) for each in values]
    # A generator for each test, so that another trend beside it does not change its p-value.
    rng = np.random.default_rng(0)
    test = jonckheere_terpstra(values, alternative="two-sided", rng=rng, permutations=PERMUTATIONS)
    cells = [cell for each in levels.values() for cell in each]
    return Trend(
        factor=factor,
        levels=tuple(levels),
        held=held,
        replicates=tuple(sizes),
        statistic=test.statistic,
        num_pairs=(sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2,
        p_value=test.p_value,
        adjusted_p_value=math.nan,
        notes=tuple(_few_replicates(sizes) + _censoring(cells) + _companions(factor, cells) + _last_stages(cells)),
    )


def _few_replicates(sizes: Sequence[int]) -> list[str]:
    if min(sizes) >= ENOUGH_REPLICATES:
        return []
    note = f"fewer than {ENOUGH_REPLICATES} replicates a level"
    arrangements = math.factorial(sum(sizes)) // math.prod(math.factorial(size) for size in sizes)
    if 2 / arrangements > SIGNIFICANT:
        note += f", too few for this test to give p below {2 / arrangements:.2g}"
    return [note]


def _censoring(cells: Sequence[Cell]) -> list[str]:
    values = np.concatenate([cell.values(SPEED) for cell in cells])
    ends = np.concatenate([cell.last_epochs() for cell in cells])[np.isnan(values)]
    if not len(ends):
        return []
    followed = f"{ends.min():g}" if ends.min() == ends.max() else f"{ends.min():g} to {ends.max():g}"
    return [f"{len(ends)} of {len(values)} replicates did not reach it in {followed} epochs and count as the latest"]


def _companions(factor: str, cells: Sequence[Cell]) -> list[str]:
    """What follows from the factor, and so moves with it."""
    params = [cell.spec.params() for cell in cells]
    names = [name for name in params[0] if name not in (*SEEDS, factor) and len({each[name] for each in params}) > 1]
    return [
        f"{name} moves with it, from {value_text(params[0][name])} to {value_text(params[-1][name])}" for name in names
    ]


# --- health ------------------------------------------------------------------------------------------------------


def health_warnings(sweep: Sweep, frame: pd.DataFrame) -> dict[str, str]:
    """A sentence for each sign of failure that the data show, by the sign's name (protocol, section 3, health).

    Of a curriculum, the phases are those of its first stage, where a model meets the source for the first time; and
    how long its accuracy lies below guessing is not known, for it has no row but the ends of its stages.
    """
    rows_of = {
        trial_id: rows.sort_values("epoch", kind="stable") for trial_id, rows in frame.groupby("trial_id", sort=False)
    }
    trials = {trial.trial_id(): trial for trial in sweep.trials if trial.trial_id() in rows_of}
    rows = {trial_id: rows_of[trial_id] for trial_id in trials}
    ties = {trial_id: float(np.fmax.reduce(column(each, "health/tie_rate"))) for trial_id, each in rows.items()}
    below = {
        trial_id: float(epochs_below_guessing(trial, rows[trial_id]))
        for trial_id, trial in trials.items()
        if trial.curriculum is None
    }
    leaked = {trial_id: last_value(each, "guessing/heldout_uncorrected") for trial_id, each in rows.items()}
    signs = {
        "Ties": _sign(ties, MAX_TIE_RATE, "tie rate above 1 %, and a tie counts as wrong", "{:.1%}"),
        "Guessing": _sign(
            below, MAX_EPOCHS_BELOW_GUESSING, "token accuracy below guessing for over five epochs", "{:g} epochs"
        ),
        "Held-out strings": _sign(
            leaked, MAX_HELDOUT_MEMORY, "memory shown on held-out strings at the end (a leak?)", "{:.3f} of 1"
        ),
    }
    overlapping = sum(_phases_overlap(_first_phases(each)) for each in rows.values())
    if overlapping:
        first = ", in the first stage that measured its own strings" if has_curriculum(sweep) else ""
        signs["Plateau"] = (
            f"no plateau between guessing and memorisation in {overlapping} of {len(rows)} trials{first} (overlapping "
            "phases: phase/plateau is missing or at most 0)"
        )
    return {name: sign for name, sign in signs.items() if sign}


def _sign(values: Mapping[str, float], most: float, sentence: str, unit: str) -> str:
    """A warning about the trials whose value is above `most`; empty if there are none."""
    above = {trial_id: value for trial_id, value in values.items() if value > most}
    if not above:
        return ""
    worst = max(above, key=lambda trial_id: above[trial_id])
    return f"{sentence}: {len(above)} of {len(values)} trials, worst {worst} with {unit.format(above[worst])}"


def epochs_below_guessing(trial: TrialSpec, rows: pd.DataFrame) -> int:
    """The longest run of evaluated epochs at which token accuracy lies below G by more than one standard error of G.

    The margin spares a model that always names the *second* most frequent of two nearly equal symbols: it has
    learned what there is to learn, and lies below G by a few tokens.
    """
    guessing = column(rows, "string/guesser_accuracy")
    guessing = guessing[~np.isnan(guessing)]
    if not len(guessing):
        return 0
    num_strings = trial.probes.compared_strings or trial.strings.num_strings
    num_targets = num_strings * trial.num_targets
    least = guessing[0] - math.sqrt(guessing[0] * (1.0 - guessing[0]) / num_targets)
    longest = current = 0
    for accuracy in column(rows, "recall/token_accuracy"):
        current = current + 1 if accuracy < least else 0
        longest = max(longest, current)
    return longest


def _first_phases(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a trial without a curriculum; of one with stages the end of the first that measured its strings."""
    return measured_ends(rows).head(1) if (column(rows, "stage") > 0).any() else rows


def _phases_overlap(rows: pd.DataFrame) -> bool:
    """Whether memorisation set in without a plateau before it."""
    return not math.isnan(last_value(rows, "phase/memorisation")) and not last_value(rows, "phase/plateau") > 0

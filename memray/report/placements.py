"""What each way of placing a trial costs: the cells of a sweep that differ in `compute` alone, side by side.

It reads a frame of costs, one row a finished trial. Costs differ from run to run, and depend on what else the machine
did: they are told as they were, lowest to highest, and nothing is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray
from rich import box
from rich.table import Table
from rich.text import Text

from memray.report import column, factors, is_number, spec_values, value_text
from memray.spec import TrialSpec
from memray.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One thing that a placement costs.

    Attributes:
        key: Its column in the frame of costs.
        title: What it is, and its unit.
        digits: Significant digits that are shown.
    """

    key: str
    title: str
    digits: int


SPEED = Cost(key="tokens_per_s", title="tokens a second", digits=3)
COSTS = (
    SPEED,
    Cost(key="peak_gib", title="peak GiB of a worker", digits=3),
    Cost(key="communication_gib", title="GiB sent by a worker", digits=3),
    Cost(key="communication_s", title="seconds of communication", digits=3),
)


@dataclass(frozen=True)
class Placement:
    """One cell of a sweep, as one way of placing its trials. Which trials have results, a frame says."""

    trials: tuple[TrialSpec, ...]
    label: str

    def values(self, costs: pd.DataFrame, key: str) -> Float[ndarray, " replicates"]:
        """A cost of each replicate for which it is known."""
        own = costs["trial_id"].isin([trial.trial_id() for trial in self.trials])
        values = column(costs.loc[own, :], key)
        return values[~np.isnan(values)]


def varies_placement(sweep: Sweep) -> bool:
    """Whether trials of a sweep are placed in more than one way."""
    return bool(_compute_fields(sweep))


def placement_groups(sweep: Sweep) -> dict[str, list[Placement]]:
    """The cells of a sweep, those together that are equal in all but `compute`, in its order.

    The key says what else the sweep moves, and where that stands in the group; it is empty if nothing does.
    """
    fields = _compute_fields(sweep)
    others = [name for name in factors(sweep) if name not in fields]
    groups: dict[str, list[Placement]] = {}
    for trials in sweep.cells().values():
        values = spec_values(trials[0])
        held = ", ".join(f"{name} = {value_text(values[name])}" for name in others)
        groups.setdefault(held, []).append(Placement(trials, placement_text(trials[0], fields)))
    return groups


def placement_text(trial: TrialSpec, fields: Sequence[str]) -> str:
    """Where a trial runs, in a few words: its engine, and what else of these fields the engine does not say."""
    compute = trial.compute
    words = [compute.engine]
    if compute.engine == "deepspeed":
        words = [f"ZeRO {compute.zero_stage}", f"{compute.workers} worker{'s' if compute.workers > 1 else ''}"]
    said = ("compute.engine", "compute.workers", "compute.zero_stage")
    values = {name.rpartition(".")[2]: trial.params()[name] for name in fields if name not in said}
    words += [f"{name} {value_text(value)}" if is_number(value) or name == "offload" else f"{value}"
              for name, value in values.items() if (name, value) != ("offload", "none")]  # fmt: skip
    return ", ".join(words)


def placement_table(sweep: Sweep, costs: pd.DataFrame) -> Table:
    """A row a placement: medians over its replicates, with the lowest and the highest of them."""
    groups = placement_groups(sweep)
    table = Table(
        title=f"{sweep.name}: what each placement costs",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    is_split = len(groups) > 1
    for name in (*(["all equal but compute"] if is_split else []), "placement"):
        table.add_column(name, overflow="fold")
    # The words of a title stand below each other, and numbers have the width.
    titles = [SPEED.title, "ratio to the first", *(cost.title for cost in COSTS[1:])]
    for title in titles:
        table.add_column(Text(_halved(title)), justify="right", overflow="fold")
    for held, placements in groups.items():
        first = placements[0].values(costs, SPEED.key)
        for placement in placements:
            speeds = placement.values(costs, SPEED.key)
            ratio = f"{np.median(speeds) / np.median(first):.2f}" if len(speeds) and len(first) else "–"
            told = [cost_text(placement.values(costs, cost.key), cost.digits) for cost in COSTS]
            table.add_row(*map(Text, ([held] if is_split else []) + [placement.label, told[0], ratio, *told[1:]]))
    most = max(len(placement.values(costs, SPEED.key)) for each in groups.values() for placement in each)
    over = "Medians over replicates [lowest,highest]. " if most > 1 else ""
    table.caption = Text(over + CAPTION)
    return table


CAPTION = (
    "Costs are those of this run, beside whatever else its machines did. Peak memory is that of a device, or on the "
    "CPU of a process. Sent: on average over the workers, in DeepSpeed's collective calls, where every part travels "
    "once to each who needs it. Seconds: in these calls; on the CPU without what they leave to be done behind them "
    "(ZeRO 3 gathers weights so)."
)


def cost_text(values: Float[ndarray, " replicates"], digits: int) -> str:
    """The median, with the lowest and the highest where there are two replicates."""
    if not len(values):
        return "–"
    median, low, high = (_significant(each, digits) for each in (np.median(values), values.min(), values.max()))
    return median if len(values) == 1 else f"{median} [{low},{high}]"


def _significant(value: float, digits: int) -> str:
    """Rounded to so many digits, all of them shown: 0.640, 1976."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def _halved(title: str) -> str:
    """A title on two lines of about equal length."""
    breaks = [k for k, character in enumerate(title) if character == " "]
    middle = min(breaks, key=lambda k: abs(2 * k - len(title)))
    return f"{title[:middle]}\n{title[middle + 1 :]}"


def _compute_fields(sweep: Sweep) -> list[str]:
    return [name for name in sweep.varying() if name.startswith("compute.")]

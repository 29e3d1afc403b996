"""Which learning rate is best: what a study that moves the rate is run for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from memray.report import OF_LAST_STAGE, SPEED, Cell, cells_of, factors, spec_values, value_text
from memray.sweep import Sweep

RATE = "training.learning_rate"


def best_rates(sweep: Sweep, frame: pd.DataFrame) -> list[str]:
    """A sentence for every setting whose rate the study moves: its best one, in the form that a spec takes.

    Best is the rate with the fewest epochs to half of robust recall in the median over replicates; a rate under which
    most replicates never came so far is no candidate. Says so where the best is the lowest or the highest that was
    tried, for then a better one may lie beyond.
    """
    if RATE not in factors(sweep):
        return []
    others = [name for name in factors(sweep) if name != RATE]
    settings: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells_of(sweep, frame).values():
        key = tuple(spec_values(cell.spec)[name] for name in others)
        settings.setdefault(key, []).append(cell)
    return [
        _sentence(cells, ", ".join(f"{name}={value_text(value)}" for name, value in zip(others, key, strict=True)))
        for key, cells in settings.items()
        if len({cell.spec.training.learning_rate for cell in cells}) > 1
    ]


def _sentence(cells: Sequence[Cell], setting: str) -> str:
    ordered = sorted(cells, key=_rate)
    reached = [cell for cell in ordered if math.isfinite(cell.centre(SPEED).numbers[0])]
    model = ordered[0].spec.model
    where = f"{model.family} {model.size}" + (f" ({setting})" if setting else "")
    tried = ", ".join(f"{_rate(cell):g}: {cell.centre(SPEED)}" for cell in ordered)
    if not reached:
        return f"no rate of {where} brought the median replicate to half of robust recall ({tried})"
    best = min(reached, key=lambda cell: cell.centre(SPEED).numbers[0])
    edges = {_rate(ordered[0]): "lowest", _rate(ordered[-1]): "highest"}
    edge = edges.get(_rate(best))
    staged = f"; {OF_LAST_STAGE}" if any(cell.spec.curriculum for cell in cells) else ""
    beyond = f"; it is the {edge} that was tried, and a better one may lie beyond" if edge else ""
    return (
        f"best rate of {where}: TrainingSpec(learning_rate={_rate(best):g}) (median epochs to robust 0.5, by rate: "
        f"{tried}){beyond}{staged}"
    )


def _rate(cell: Cell) -> float:
    assert cell.spec.training.learning_rate is not None  # filled in by the spec
    return cell.spec.training.learning_rate

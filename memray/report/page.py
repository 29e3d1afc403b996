"""The written report of a study: one HTML page that needs nothing else, and its figures as files beside it.

The page says first what may be wrong, then what the study's claims came to, and only then shows the curves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from memray.report import OF_LAST_STAGE, SEEDS, SPEED, cells_of, has_corpus, has_curriculum, interval_text, value_text
from memray.report.charts import Figure
from memray.report.drawing import to_script, write_png
from memray.report.figure import write_sweep_figure
from memray.report.health import signs
from memray.report.one_string import best_string, order_chart, token_map
from memray.report.rates import best_rates
from memray.report.records import RecordsOf
from memray.report.sample_figures import most_memorised
from memray.report.study_figures import study_figures
from memray.report.table import shown_keys, trends
from memray.report.verdicts import ENOUGH_REPLICATES, Finding, judge
from memray.sweep import Sweep

TEMPLATE = Path(__file__).with_name("page.html")
MARKS = {"supported": "✓", "contradicted": "✗", "undecided": "?", "found": "!", "fine": "✓", "not measured": "–"}


def write_report(
    sweep: Sweep,
    frame: pd.DataFrame,
    folder: Path,
    *,
    records: RecordsOf | None = None,
    provenance: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes `report.html` and the figures into a folder, which is made, and returns their paths, the page first.

    Args:
        frame: The results, as `results` gives them.
        records: Of each trial, for what the results do not hold; without them no figure shows single tokens.
        provenance: What else the numbers stand on, by what it is.

    Raises:
        ValueError: If there is no result yet.
    """
    if not len(frame):
        raise ValueError(f"a report needs finished trials, but {sweep.name} has none; `run` it first")
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):  # an earlier report of the study may have had other figures
        old.unlink()
    figures = study_figures(sweep, frame, records)
    record = best_string(sweep, frame, records) if records else None
    if record is not None and record.guesser is not None and "order/spearman" in frame:
        figures.append(order_chart(record))
    token_figure = None if record is None else token_map(record)
    page = folder / "report.html"
    listed = most_memorised(sweep, frame, records) if records and has_corpus(sweep) else []
    written = report_page(sweep, frame, figures, token_figure, provenance or {}, listed, records)
    page.write_text(written, encoding="utf-8")
    drawn = [*figures, token_figure] if token_figure else figures
    return [page, *write_sweep_figure(sweep, frame, folder), *(write_png(each, folder) for each in drawn)]


def report_page(
    sweep: Sweep,
    frame: pd.DataFrame,
    figures: Sequence[Figure],
    tokens: Figure | None,
    provenance: Mapping[str, str],
    samples: Sequence[Mapping[str, Any]] = (),
    records: RecordsOf | None = None,
) -> str:
    """The page: health, claims, the figures given, the cells, and what the numbers stand on."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    findings = judge(sweep, frame, records)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        name=sweep.name,
        question=sweep.question or sweep.name,
        verdicts=_tally(findings),
        signs=[{"mark": MARKS[each.state], **each._asdict()} for each in signs(sweep, frame)],
        findings=[_row(each, before) for each, before in zip(findings, [None, *findings], strict=False)],
        enough=ENOUGH_REPLICATES,
        figures=figures,
        tokens=tokens,
        samples=samples,
        sentences=[trend.sentence() for trend in trends(sweep, frame)] + best_rates(sweep, frame),
        table=_table(sweep, frame),
        provenance=provenance,
        plotly=Markup(get_plotlyjs()),
        plots=Markup(to_script([*figures, tokens] if tokens else figures)),
    )


def _breakable(name: str) -> Markup:
    """A key that a narrow column may break after its separators."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(name))))


# --- claims --------------------------------------------------------------------------------------------------------


def _tally(findings: Sequence[Finding]) -> str:
    counts = dict.fromkeys(("supported", "contradicted", "undecided"), 0)
    for each in findings:
        counts[each.verdict] += 1
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def _row(finding: Finding, before: Finding | None) -> dict[str, Any]:
    """One row of the claims table, for people; what the row before it has said of the same claim is not said again."""
    claim, evidence = finding.claim, finding.evidence
    fewest, most = finding.num_replicates
    return {
        "id": claim.id,
        "sentence": claim.sentence,
        "about": "" if before and before.claim == claim else f"{claim.measured} · {claim.source}",
        "where": "; ".join(filter(None, (evidence.where, evidence.what, _levels(evidence.levels), *evidence.notes))),
        "effect": _effect(finding, finding.estimate),
        "interval": f"[{_effect(finding, finding.interval.low)}, {_effect(finding, finding.interval.high)}]",
        "unit": "" if claim.is_relative else claim.unit,
        "claimed": _claimed(finding),
        "p_value": _p_text(finding.adjusted),
        "trend": "" if math.isnan(finding.trend_p_value) else f"trend {_p_text(finding.trend_p_value)}",
        "replicates": str(fewest) if fewest == most else f"{fewest}–{most}",
        "verdict": finding.verdict,
        "mark": MARKS[finding.verdict],
        "deciding": _deciding(finding),
    }


def _levels(levels: Sequence[str]) -> str:
    return " → ".join(levels) if len(levels) > 1 else ""


def _effect(finding: Finding, effect: float) -> str:
    """An effect in its unit: a relative one in per cent, unless one end of it was never reached."""
    if math.isnan(effect):
        return "unknown"
    if finding.claim.is_relative and effect in (-1.0, math.inf):
        return "to never" if effect > 0 else "from never"
    if math.isinf(effect):
        return "+∞" if effect > 0 else "−∞"
    text = f"{100 * effect:+.0f} %" if finding.claim.is_relative else f"{effect:+.3g}"
    return re.sub(r"^[+-]0(?=$| )", "0", text).replace("-", "−")


def _claimed(finding: Finding) -> str:
    """What the effect would have to be."""
    claim = finding.claim
    size = f"{100 * claim.smallest:g} %" if claim.is_relative else f"{claim.smallest:g}"
    return {
        "rises": f"above +{size}" if claim.smallest else "above 0",
        "falls": f"below −{size}",
        "stays": f"within ±{size}",
        "moves": f"beyond ±{size}" if claim.smallest else "off 0",
        "does not rise": f"not above +{size}",
    }[claim.direction]


def _p_text(p_value: float) -> str:
    if math.isnan(p_value):
        return "–"
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _deciding(finding: Finding) -> str:
    if finding.verdict != "undecided":
        return ""
    if math.isnan(finding.deciding):
        return "none: the effect seen is too small"
    return "more than 1000" if math.isinf(finding.deciding) else f"{finding.deciding:.0f}"


# --- cells ---------------------------------------------------------------------------------------------------------


def _table(sweep: Sweep, frame: pd.DataFrame) -> dict[str, Any]:
    """The table of cells, as it is printed at the end of a run."""
    names = [name for name in sweep.varying() if name not in SEEDS]
    cells = list(cells_of(sweep, frame).values())
    rows = []
    for cell in cells:
        params = cell.spec.params()
        number, planned = len(cell.last), len(cell.trials)
        censored = int(pd.isna(cell.values(SPEED)).sum())
        row = [value_text(params[name]) for name in names]
        row += [f"{number}" if number == planned else f"{number} of {planned}", f"{censored}"]
        rows.append(row + [str(cell.centre(key)) for key in shown_keys(sweep)])
    return {
        "names": [_breakable(name) for name in (*names, "replicates", "censored", *shown_keys(sweep))],
        "about": f" {OF_LAST_STAGE.capitalize()}." if has_curriculum(sweep) else "",
        "rows": rows,
        "interval": interval_text([cell.present for cell in cells]),
    }

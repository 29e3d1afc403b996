"""The written report: one page that asks no network for anything, says what was found, and draws what was measured."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from matplotlib.image import imread
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from memray.cli import app
from memray.cluster.ledger import Ledger
from memray.material import known_strings
from memray.measurement import Measurement, context_table, string_table, token_table
from memray.measures.recall import Guesser
from memray.report import SPEED, cells_of
from memray.report.charts import Chart, HeatMap
from memray.report.drawing import to_script
from memray.report.health import signs
from memray.report.one_string import StringRecord, best_recalled, order_chart, token_map
from memray.report.page import report_page
from memray.report.provenance import provenance
from memray.report.study_figures import study_figures
from memray.report.table import SHOWN
from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, load
from memray.trial import run_trial
from tests.test_report import alphabets, falling, grid, planted, rising

HEADINGS = ["Health", "Claims", "Figures", "One string, token by token", "Cells", "Provenance"]
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}

STUDY = '''"""Are <small> alphabets "slower" & later?"""

from memray.report.table import SHOWN
from memray.probes import ContextSpec
from memray.spec import ProbesSpec, StringsSpec, TrainingSpec, TrialSpec
from memray.sweep import Sweep, replicates, vary

CONTEXT = ContextSpec(replacements=("source",), lengths=(0, 3), redraws=2)
BASE = TrialSpec(
    strings=StringsSpec(length=24), training=TrainingSpec(epochs=6), probes=ProbesSpec(num_held_out=2, context=CONTEXT)
)


def sweep(*, seeds: int = 2):
    cells = [{"strings.alphabet_size": size} for size in (2, 7)]
    return Sweep(vary(BASE, cell | seed) for cell in cells for seed in replicates(BASE, seeds))
'''


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text between them by the innermost tag."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def plots(self) -> dict[str, dict]:
        """What is drawn, by the element that it is drawn into."""
        found = re.search(r"Object\.entries\((.*)\)\) Plotly", self.of("script")[-1])
        assert found
        return json.loads(found[1])


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study file whose trials were run, each in this process, into the ledger beside it."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "small.py"
    path.write_text(STUDY)
    sweep = load(path)
    ledger = Ledger(str(folder / "runs"), sweep.name)
    for trial in sweep.trials:
        measured: list[Measurement] = list(run_trial(trial))
        with ledger.trial(trial.trial_id()).claim(trial.canonical_json(), "test") as attempt:
            tables = [table(measured) for table in (token_table, string_table, context_table)]
            attempt.append([each.record() for each in measured], *tables)
            probes = {"probes_id": trial.probes.probes_id()}
            attempt.finish({"epochs": 6, "seconds": 1.5, "torch": "2.9", "device": "AVX2"} | probes)
    return path


@pytest.fixture(scope="module")
def written(study: Path) -> Path:
    """The folder of the report that the command line has written of it."""
    done = CliRunner().invoke(app, ["report", str(study), "--storage", str(study.parent / "runs")])
    assert done.exit_code == 0, done.output
    folder = study.parent / "runs" / "small" / "report"
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    return folder


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page((written / "report.html").read_text(encoding="utf-8"))


# --- a real study ----------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_asks_no_network_for_anything(page: Page):
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in {"link", "img", "iframe", "object"}
        assert not {"src", "srcset", "action"} & {*attributes}
        assert (attributes.get("href") or "#").startswith("#")
    styles = " ".join(page.of("style"))
    assert "url(" not in styles
    assert "@import" not in styles


def test_the_page_says_the_question_first_and_then_each_section_in_order(page: Page):
    assert page.of("h1") == ['Are <small> alphabets "slower" & later?']
    assert page.of("h2") == HEADINGS
    assert [name for name, _ in page.tags if name in ("h1", "h2")] == ["h1"] + ["h2"] * len(HEADINGS)


def test_every_figure_has_a_title_words_for_those_who_do_not_see_it_and_a_file(page: Page, written: Path):
    ids = {attributes.get("id") for _, attributes in page.tags}
    labelled = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert {*labelled} <= ids
    drawn = [attributes for _, attributes in page.tags if attributes.get("role") == "img"]
    assert [attributes["id"] for attributes in drawn] == [*page.plots]
    assert all(attributes["aria-label"] for attributes in drawn)
    for name in page.plots:
        pixels = np.asarray(imread(written / f"{name.removeprefix('plot-')}.png"))[..., :3]
        assert (pixels.max(axis=2) - pixels.min(axis=2) > 0.2).sum() > 50
    assert (written / "recall.png").is_file()
    for name in ("robust", "speed", "accuracy", "loss", "mass", "kl", "sufficient-1", "sufficient-2", "tokens"):
        assert f"plot-{name}" in page.plots


def test_a_study_of_two_seeds_is_undecided_and_says_that_five_are_needed(page: Page):
    verdicts = [text for text in page.of("span") if "undecided" in text]
    assert verdicts == ["? undecided"] * len(verdicts)
    assert len(verdicts) > 0
    assert not any("supported" in text for text in page.of("span"))


def test_provenance_names_seeds_devices_and_versions(page: Page):
    said = dict(zip(page.of("dt"), page.of("dd"), strict=True))
    assert said["Trials"] == "4 of 4 finished, in 2 cells"
    assert (said["string_seed"], said["Devices"], said["torch"]) == ("0–1", "AVX2", "2.9")
    assert said["Training"] == "6 s in all"
    assert "memray 2.0.0" in said["Report"]


def test_a_report_written_again_is_the_same_and_mlflow_has_it_once(study: Path, written: Path):
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    uri = f"sqlite:///{study.parent / 'runs' / 'mlflow.db'}"
    client = MlflowClient(uri)
    (experiment,) = [each for each in client.search_experiments() if each.name == "small"]
    (run,) = client.search_runs([experiment.experiment_id])
    logged = {Path(each.path).name for each in client.list_artifacts(run.info.run_id, "report")}
    assert logged == {*before}
    again = CliRunner().invoke(app, ["report", str(study), "--storage", str(study.parent / "runs")])
    assert again.exit_code == 0, again.output
    assert {path.name: path.read_bytes() for path in written.iterdir()} == before
    (same,) = client.search_runs([experiment.experiment_id])
    assert same.data.tags["memray.report"] == run.data.tags["memray.report"]


def test_a_report_of_nothing_is_refused(study: Path, tmp_path: Path):
    done = CliRunner().invoke(app, ["report", str(study), "--storage", str(tmp_path)])
    assert done.exit_code == 2
    assert "a report needs finished trials, but small has none; `run` it first" in done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_every_figure(written: Path, page: Page):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"file://{written / 'report.html'}"], capture_output=True, text=True, timeout=120, check=True
    )
    assert len(re.findall(r'class="plot js-plotly-plot"', done.stdout)) == len(page.plots)


# --- what is said of planted results ---------------------------------------------------------------------------------


def page_of(sweep: Sweep, frame: pd.DataFrame) -> Page:
    return Page(report_page(sweep, frame, [], None, {}))


def named(sweep: Sweep, name: str) -> Sweep:
    return sweep.named(name, "Is what was planted found again?")


def test_each_verdict_stands_in_the_table_with_effect_and_interval():
    sweep = named(alphabets(2, 26, seeds=6), "schedule")
    for speed, verdict in ((falling, "✓ supported"), (rising, "✗ contradicted")):
        found = page_of(sweep, planted(sweep, speed))
        assert verdict in found.of("span")
        assert "below −10 %" in found.of("td")
    first = page_of(sweep, planted(sweep, lambda trial: 20.0 + 9.0 * trial.string_seed))
    assert "? undecided" in first.of("span")
    assert "0 %" in first.of("td")


def test_a_level_that_was_never_reached_is_named_so():
    sweep = named(alphabets(2, 26, seeds=6), "schedule")
    frame = planted(sweep, lambda trial: math.nan if trial.strings.alphabet_size == 2 else 20.0)
    assert "from never" in page_of(sweep, frame).of("td")


def test_the_table_of_cells_shows_what_a_finished_run_prints():
    sweep = alphabets(2, 7)
    frame = planted(sweep, lambda trial: math.nan if trial.strings.alphabet_size == 2 else 10.0 + trial.string_seed)
    cells = page_of(sweep, frame).of("td")
    for cell, first in zip(cells_of(sweep, frame).values(), ("2", "7"), strict=True):
        row = cells[-8:] if first == "7" else cells[-16:-8]
        assert row[0] == first
        assert row[2:4] == (["3", "0"] if first == "7" else ["3", "3"])
        assert row[4:] == [str(cell.centre(key)) for key in SHOWN]


def test_a_study_that_judges_no_claim_says_so():
    sweep = named(alphabets(2, 26), "length")
    frame = planted(sweep, falling).drop(columns=["phase/plateau", "phase/memorisation", SPEED, "recall/robust"])
    frame = frame.drop(columns="string/guesser_accuracy")
    assert "No claim can be judged from this study's cells." in page_of(sweep, frame).of("p")


@pytest.mark.parametrize(
    ("constant", "name", "warning"),
    [
        ({"phase/plateau": 0.0}, "Plateau", "no plateau"),
        ({"recall/token_accuracy": 0.0}, "Guessing", "token accuracy below guessing"),
        ({"guessing/heldout_uncorrected": 0.2}, "Held-out strings", "memory shown on held-out"),
        ({"health/tie_rate": 0.02}, "Ties", "tie rate above"),
    ],
)
def test_each_sign_of_failure_is_found_under_its_name(constant: dict[str, float], name: str, warning: str):
    sweep = alphabets(2, 26)
    by_name = {each.name: each for each in signs(sweep, planted(sweep, falling).assign(**constant))}
    assert by_name[name].state == "found"
    assert by_name[name].sentence.startswith(warning)


def test_what_is_in_order_and_what_was_not_measured_is_said_as_well():
    sweep = alphabets(2, 7, 26, seeds=5)
    states = {each.name: each.state for each in signs(sweep, planted(sweep, falling))}
    assert states == dict.fromkeys(("Plateau", "Guessing", "Entropy", "Held-out strings", "Ties"), "fine")
    lacking = planted(sweep, lambda trial: 20.0 + trial.string_seed).drop(columns="health/tie_rate")
    states = {each.name: each.state for each in signs(sweep, lacking)}
    assert (states["Entropy"], states["Ties"]) == ("found", "not measured")
    single = grid([{}])
    assert {each.name: each.state for each in signs(single, planted(single, falling))}["Entropy"] == "not measured"


# --- what is drawn -------------------------------------------------------------------------------------------------


def chart(sweep: Sweep, frame: pd.DataFrame, name: str) -> Chart:
    (found,) = [each for each in study_figures(sweep, frame) if each.name == name]
    assert isinstance(found, Chart)
    return found


def test_a_replicate_that_never_arrived_is_an_arrow_above_all_that_did():
    sweep = alphabets(2, 26)
    frame = planted(sweep, lambda trial: math.nan if trial.strings.alphabet_size == 2 else 10.0 + trial.string_seed)
    drawn = chart(sweep, frame, "speed")
    arrows = [each for each in drawn.traces if each.style.marker == "triangle-up" and len(each.x)]
    assert [[*each.x] for each in arrows] == [["2"] * 3]
    reached = [each for each in drawn.traces if each.style.marker != "triangle-up" and len(each.x)]
    assert [[*each.y] for each in reached] == [[10.0, 11.0, 12.0], [11.0]]
    assert min(arrows[0].y) > 40 > 12
    assert drawn.y_range is not None
    assert max(arrows[0].y) < drawn.y_range[1]


def test_lines_are_medians_with_bands_and_differ_without_colour():
    sweep = alphabets(2, 7, 26)
    drawn = chart(sweep, planted(sweep, falling), "robust")
    lines = [each for each in drawn.traces if len(each.low)]
    assert len({(each.style.dash, each.style.marker) for each in lines}) == 3
    for line, size in zip(lines, (2, 7, 26), strict=True):
        speeds = [30 - 8 * math.log10(size) + seed for seed in range(3)]
        curves = [[1 / (1 + math.exp(-(epoch - speed) / 3)) for epoch in range(41)] for speed in speeds]
        np.testing.assert_allclose(line.y, curves[1])
        np.testing.assert_allclose([line.high, line.low], [curves[0], curves[2]])
    assert "2, 7, 26, guessing" in drawn.alt


def test_columns_of_a_probe_bring_their_figures():
    sweep = grid([{}])
    columns = {f"context/local_{k}_source": 0.1 * k for k in (1, 5)} | {"context/local_full_source": 0.9}
    columns |= {"context/local_1_wrong": 0.05, "context_heldout/local_1_source": 0.02, "extractable/50": 0.3}
    columns |= {"context_grid/0_50": 0.2, "context_grid/5_50": 0.4, "older/longest_run": 0.2,
                "older/longest_run_tokens": 9.0}  # fmt: skip
    figures = {each.name: each for each in study_figures(sweep, planted(sweep, falling).assign(**columns))}
    prefix, measures, shares = figures["prefix"], figures["measures"], figures["grid"]
    assert isinstance(prefix, Chart)
    assert isinstance(measures, Chart)
    assert isinstance(shares, HeatMap)
    by_name = {each.name: dict(zip(each.x, each.y, strict=True)) for each in prefix.traces}
    assert by_name["source"] == {"1": 0.1, "5": 0.5, "full": 0.9}
    assert by_name["held-out, source"] == {"1": 0.02}
    assert [each.name for each in measures.traces][2:] == ["extractable/50", "older/longest_run"]
    np.testing.assert_array_equal(shares.values, [[0.2], [0.4]])


def test_the_share_of_right_windows_is_held_against_that_of_independent_errors():
    sweep = grid([{}], seeds=1)
    columns = {"recall/token_accuracy": 0.96, "older/windows_right_32": 0.4, "older/windows_right_50": 0.3}
    drawn = chart(sweep, planted(sweep, falling).assign(**columns), "measures")
    by_name = {each.name: {*each.y} for each in drawn.traces}
    assert by_name["50 if independent"] == {0.96**50}
    short = planted(sweep, falling).assign(**{"older/longest_run": 0.2})
    assert not any("independent" in each.name for each in chart(sweep, short, "measures").traces)


@pytest.fixture(scope="module")
def measured() -> tuple[TrialSpec, list[Measurement]]:
    trial = TrialSpec(
        strings=StringsSpec(length=20, alphabet_size=3, num_strings=2),
        training=TrainingSpec(epochs=9),
        probes=ProbesSpec(num_held_out=1),
    )
    return trial, list(run_trial(trial))


@dataclass(frozen=True)
class Kept:
    """The records of one trial, in memory."""

    measured: list[Measurement]

    def tokens(self) -> pa.Table:
        return token_table(self.measured)

    def strings(self) -> pa.Table:
        return string_table(self.measured)

    def context(self) -> pa.Table:
        return context_table(self.measured) or pa.table({})

    def matrix(self) -> pa.Table:
        return pa.table({})

    samples = matrix


def record_of(trial: TrialSpec, measured: list[Measurement]) -> StringRecord:
    found = StringRecord.of(trial, Kept(measured))
    assert found is not None
    return found


def test_one_string_is_shown_token_by_token(measured: tuple[TrialSpec, list[Measurement]]):
    trial, measurements = measured
    figure = token_map(record_of(trial, measurements))
    ids = np.array(measurements[0].strings[-1]["symbol_ids"])
    _, (known, *_) = known_strings(trial, trial.source(), ids, "trained")
    assert [*figure.y] == [str(epoch) for epoch in range(10)]
    for row, measurement in enumerate(measurements):
        own = measurement.tokens["trained"].of(0)
        np.testing.assert_allclose(figure.values[row], np.exp(own.log_prob), rtol=1e-6)
        for column, (position, top) in enumerate(zip(own.position, own.argmax, strict=True)):
            said = figure.hover[row][column]
            assert f"position {position}<br>{known.text[position]!r}" in said
            name = "abc"[ids.tolist().index(top)] if top in ids else "a tie" if top == -1 else f"token {top}"
            assert said.endswith(f"top prediction: {name}")


def test_the_order_of_a_string_is_the_first_epoch_from_which_half_of_each_surprise_is_gone(
    measured: tuple[TrialSpec, list[Measurement]],
):
    trial, measurements = measured
    record = record_of(trial, measurements)
    guesser = Guesser(log2_probability=np.linspace(-8.0, -1.0, len(record.positions)), accuracy=0.5)
    arrived, late = order_chart(replace(record, guesser=guesser)).traces
    expected = {}
    for index, position in enumerate(record.positions):
        enough = [math.exp(row[index]) >= math.sqrt(2.0 ** guesser.log2_probability[index]) for row in record.log_prob]
        epochs = [epoch for epoch in record.epochs if all(enough[epoch:])]
        if epochs:
            expected[position] = epochs[0]
    assert expected
    assert dict(zip(arrived.x, arrived.y, strict=True)) == expected
    assert {*late.x} == {*record.positions} - {*expected}


def test_tokens_that_structure_fixes_have_no_place_in_the_order(measured: tuple[TrialSpec, list[Measurement]]):
    record = record_of(*measured)
    fixed = np.arange(len(record.positions)) >= 5
    guesser = Guesser(log2_probability=np.where(fixed, 0.0, -1.5), accuracy=0.5)
    arrived, late = order_chart(replace(record, guesser=guesser)).traces
    assert {*arrived.x, *late.x} == {*record.positions[:5]}


def test_the_string_that_is_recalled_best_is_the_one_shown():
    sweep = alphabets(2, 26)
    frame = planted(sweep, falling)
    assert best_recalled(sweep, frame) == sweep.trials[3]  # the first of the larger alphabet
    assert best_recalled(sweep, frame.drop(columns="recall/robust")) == sweep.trials[0]


def test_a_symbol_cannot_end_the_script_that_draws_it():
    figure = HeatMap(
        name="tokens", title="", x_title="", y_title="", caption="", x=["0"], y=["0"], values=np.array([[0.5]]),
        value_title="", hover=[["</script>"]],
    )  # fmt: skip
    script = to_script([figure])
    assert "</script>" not in script
    assert json.loads(re.findall(r"entries\((.*)\)\) Plotly", script)[0])["plot-tokens"]["data"][0]["text"] == [
        ["</script>"]
    ]


def test_provenance_says_what_is_not_known():
    said = provenance(alphabets(2), [], {})
    assert said["Trials"] == "0 of 3 finished, in 1 cells"
    assert said["Devices"] == said["Commit of the report's code"] == "not known"

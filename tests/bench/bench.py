"""The benchmark: one table, each row side by side in one run on this machine, which should be idle otherwise.

    python tests/bench/bench.py [--quick] [--only NAME ...]

Every side is a process of its own, from its start to its end; the sides take turns, and a ratio is the median over the
turns. `--quick` proves that everything works; its figures mean nothing.
"""

import argparse
import json
import math
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from memray.cluster.ledger import Ledger
from memray.sweep import Sweep, load

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STUDY, SEQUENCES = HERE / "tiny_trials.py", HERE / "tiny_sequences.py"
NAMES = ("bare", "trainer", "tune", "overhead", "mlflow", "probes", "context", "sequence", "corpus", "profile")
# What two sides of the same recipe may differ by in their first epochs; rounding grows later.
TOLERANCE, COMPARED_EPOCHS = 1e-3, 10
KEYS = ("recall/token_accuracy", "recall/nll_nats")

Curves = dict[str, dict[int, Mapping[str, float]]]  # trial id -> epoch -> metrics


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run; the study has four trials a seed."""

    repetitions: int
    study: tuple[str, ...]
    trainer_trials: int
    tune_trials: int
    empty_seeds: int
    context_length: int
    sequence: tuple[str, ...]
    corpus: tuple[str, ...]

    def sweep(self) -> Sweep:
        return load(STUDY, **dict(pair.split("=") for pair in self.study))


FULL = Scale(
    repetitions=3,
    study=("seeds=5", "length=256", "epochs=100"),
    trainer_trials=4,
    tune_trials=8,
    empty_seeds=50,
    context_length=1024,
    sequence=("num_strings=200", "epochs=60"),
    corpus=("num_samples=240", "epochs=20"),
)
QUICK = Scale(
    repetitions=1,
    study=("seeds=1", "length=48", "epochs=12"),
    trainer_trials=2,
    tune_trials=2,
    empty_seeds=2,
    context_length=128,
    sequence=("num_strings=40", "epochs=4"),
    corpus=("num_samples=24", "epochs=40"),
)


# --- the sides ---------------------------------------------------------------------------------------------------


def timed(*command: str) -> tuple[float, list[tuple[float, str]]]:
    """Runs Python from the root of the project; returns its seconds, and its lines with the second each came at."""
    foreign = ("MLFLOW_", "MEMRAY_", "RAY_", "OMP_")  # they would send a side elsewhere
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    environment = kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=errors
        )
        assert process.stdout is not None
        lines = [(time.perf_counter() - began, line) for line in process.stdout]
        code, seconds = process.wait(), time.perf_counter() - began
        if code:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with exit code {code}:\n{errors.read()[-4000:]}")
    return seconds, lines


def last_line(*command: str) -> Any:
    return json.loads(timed(*command)[1][-1][1])


def start_cluster() -> float:
    """Seconds that `run` takes to start a cluster, measured alone: within `run`, imports go on beside it."""
    return last_line(
        "-c",
        "import time; from memray.cluster.launch import connect; began = time.perf_counter(); connect('local'); "
        "print(time.perf_counter() - began)",
    )


def run_ours(study: Path, pairs: Sequence[str], folder: Path) -> tuple[float, dict[str, float], Curves]:
    """Seconds of `python -m memray run` on a fresh storage, its stages by when it says what, and what it measured."""
    parameters = [part for pair in pairs for part in ("-p", pair)]
    seconds, lines = timed("-m", "memray", "run", str(study), *parameters, "--storage", str(folder / "ours"))
    began = next(when for when, line in lines if "trials to run" in line)
    ends = [when for when, line in lines if " finished, " in line]
    stages = {
        "imports, plan, cluster start": began,
        "until the first trial ends": ends[0] - began,
        "until the last trial ends": ends[-1] - ends[0],
        "rest of MLflow, results, shutdown": seconds - ends[-1],
    }
    sweep = load(study, **dict(pair.split("=") for pair in pairs))
    ledger = Ledger(str(folder / "ours"), sweep.name)
    records = {trial.trial_id(): ledger.trial(trial.trial_id()).measurements()[0] for trial in sweep.trials}
    return seconds, stages, curves(records)


def run_bare(scale: Scale, folder: Path) -> tuple[float, Curves]:
    out = folder / "bare.json"
    seconds, _ = timed(str(HERE / "bare_loops.py"), str(out), *scale.study)
    return seconds / len(scale.sweep().trials), curves(json.loads(out.read_text()))


def run_trainer(scale: Scale, folder: Path) -> tuple[float, Curves]:
    uri = fresh_database(folder / "trainer.db")
    took = 0.0
    for number in range(scale.trainer_trials):
        took += timed(str(HERE / "with_trainer.py"), "alone", uri, str(folder / "trainer"), str(number), *scale.study)[
            0
        ]
    return took / scale.trainer_trials, curves_in_mlflow(folder / "trainer.db", step_of_epoch_0=0)


def run_tune(scale: Scale, folder: Path) -> tuple[float, Curves]:
    uri, count = fresh_database(folder / "tune.db"), str(scale.tune_trials)
    took = last_line(str(HERE / "with_trainer.py"), "tune", uri, str(folder / "tune"), count, *scale.study)
    return took / scale.tune_trials, curves_in_mlflow(folder / "tune.db", step_of_epoch_0=1)


def fresh_database(path: Path) -> str:
    """An SQLite file whose schema is there before the clock starts, which `run` is not granted."""
    timed("-c", f"import mlflow; mlflow.MlflowClient('sqlite:///{path}').search_experiments()")
    return f"sqlite:///{path}"


# --- agreement ---------------------------------------------------------------------------------------------------


def curves(records: Mapping[str, list[dict[str, Any]]]) -> Curves:
    return {trial_id: {each["epoch"]: each["metrics"] for each in lines} for trial_id, lines in records.items()}


def curves_in_mlflow(database: Path, *, step_of_epoch_0: int) -> Curves:
    """What an MLflow database holds whose runs are named after trials."""
    found: Any = defaultdict(lambda: defaultdict(dict))
    query = "SELECT runs.name, step, key, value FROM metrics JOIN runs USING (run_uuid)"
    with sqlite3.connect(database) as connection:
        for trial_id, step, key, value in connection.execute(query):
            found[trial_id][step - step_of_epoch_0][key] = value
    return found


def difference(ours: Curves, theirs: Curves) -> float:
    """The largest difference of token accuracy or nll in the first epochs; infinite where a value is missing."""
    differences = [
        abs(metrics[key] - theirs[trial_id].get(epoch, {}).get(key, math.inf))
        for trial_id in theirs
        for epoch, metrics in ours[trial_id].items()
        for key in KEYS
        if epoch <= COMPARED_EPOCHS
    ]
    return max(differences, default=math.inf)


# --- the table ---------------------------------------------------------------------------------------------------


def row(
    name: str,
    unit: str,
    ours: list[float],
    theirs: list[float] | None = None,
    *,
    limit: float = 0,
    is_gain: bool = False,
) -> list[str]:
    """One comparison as text. A gain is theirs over ours and at least the limit, anything else ours over theirs and at
    most the limit."""
    shown = [f"{median(ours):,.3g} {unit}" if median(ours) < 1000 else f"{median(ours):,.0f} {unit}"]
    if theirs is None:
        return [name, *shown, "", "", "", "", str(len(ours))]
    ratios = [b / a if is_gain else a / b for a, b in zip(ours, theirs, strict=True)]
    is_met = median(ratios) >= limit if is_gain else median(ratios) <= limit
    shown += [
        f"{median(theirs):.3g} {unit}",
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{'>=' if is_gain else '<='} {limit:g}",
        "ok" if is_met else "misses",
    ]
    return [name, *shown, str(len(ours))]


Side = Callable[[Scale, Path], tuple[float, Curves]]
# What is compared, by whom, the required ratio and whether it is a gain, and whether our cluster start counts.
COMPARED: dict[str, tuple[str, Side, float, bool, bool]] = {
    "bare": ("a trial*: run, against bare loops in one process", run_bare, 1.25, False, False),
    "trainer": ("a trial: run, against Trainer in a process of its own", run_trainer, 4, True, True),
    "tune": ("a trial*: run, against Trainer in Tune, Ray's MLflow callback", run_tune, 3, True, False),
}


def compare_runs(scale: Scale, wanted: list[str], folder: Path) -> tuple[list[list[str]], dict[str, float], list[str]]:
    """The rows of `run` against others, the stages of its last repetition, and how far the numbers of both agree."""
    seconds: dict[str, list[float]] = defaultdict(list)
    differences: dict[str, float] = defaultdict(float)
    stages: dict[str, float] = {}
    num_trials = len(scale.sweep().trials)
    for repetition in range(scale.repetitions):
        here = folder / f"{repetition}"
        here.mkdir()
        seconds["cluster start"].append(start_cluster())
        whole_s, stages, ours = run_ours(STUDY, scale.study, here)
        seconds["run"].append(whole_s)
        for name in wanted:
            took, theirs = COMPARED[name][1](scale, here)
            seconds[name].append(took)
            differences[name] = max(differences[name], difference(ours, theirs))
        done = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"repetition {repetition + 1} of {scale.repetitions}: {done}", file=sys.stderr)
    with_start = [whole / num_trials for whole in seconds["run"]]
    without = [(a - b) / num_trials for a, b in zip(seconds["run"], seconds["cluster start"], strict=True)]
    rows = [
        row("cluster start", "s", seconds["cluster start"]),
        row(f"run of {num_trials} trials, cluster start and all", "s", seconds["run"]),
    ]
    for name in wanted:
        title, _, limit, is_gain, has_start = COMPARED[name]
        rows.append(row(title, "s", with_start if has_start else without, seconds[name], limit=limit, is_gain=is_gain))
    agreement = [
        f"{name} {'agrees' if worst <= TOLERANCE else 'DISAGREES'} with run (by {worst:.0e} at most)"
        for name, worst in differences.items()
    ]
    return rows, stages, agreement


def compare_probers(scale: Scale, folder: Path) -> list[list[str]]:
    """Time a trained token of one trial at a time that is not probed, probed by an actor, and probed within itself."""
    sides = {"none": ("0", "probed=false"), "actor": ("1", "probed=true"), "inside": ("0", "probed=true")}
    token_us: dict[str, list[float]] = defaultdict(list)
    waits: list[float] = []
    for repetition in range(scale.repetitions):
        for name, (actors, probed) in sides.items():
            pairs = ["seeds=1", *scale.study[1:], probed]
            storage = folder / f"probes-{repetition}-{name}"
            parameters = [part for pair in pairs for part in ("-p", pair)]
            timed("-m", "memray", "run", str(STUDY), *parameters, "--storage", str(storage), "--max-concurrent", "1",
                  "--probe-actors", actors)  # fmt: skip
            sweep = load(STUDY, **dict(pair.split("=") for pair in pairs))
            finished = [Ledger(str(storage), sweep.name).trial(each.trial_id()).finished() for each in sweep.trials]
            summaries = [each.summary for each in finished if each]
            token_us[name].append(1e6 / median(each["tokens_per_s"] for each in summaries))
            waits += [each["probe_s"] for each in summaries if "probe_s" in each]
    return [
        row(
            "a trained token: with a probe actor, against unprobed",
            "µs",
            token_us["actor"],
            token_us["none"],
            limit=1.05,
        ),
        row(
            "a trained token: with probes inside, against unprobed",
            "µs",
            token_us["inside"],
            token_us["none"],
            limit=1.05,
        ),
        row("from a snapshot to its result", "s", waits),
    ]


def compare_contexts(scale: Scale) -> tuple[list[list[str]], str]:
    """The context probe's packed branches against prompts at k = 10, and its peak memory at all lengths."""
    script, length, threads = str(HERE / "context.py"), f"length={scale.context_length}", "threads=2"
    found = last_line(script, "compare", length, "k=10", threads, f"repetitions={scale.repetitions}")
    peak = last_line(script, "memory", length, threads)
    rows = [
        row(
            f"context of {scale.context_length} symbols at k = 10: packed branches, against prompts",
            "s",
            found["packed_s"],
            found["prompts_s"],
            limit=20,
            is_gain=True,
        ),
        row(
            f"peak memory of a context probe at all k ({peak['before_gib']:.2f} GiB before it)",
            "GiB",
            [peak["peak_gib"]],
        ),
    ]
    agreement = (
        f"context: logits differ by {found['largest_difference']:.0e} at most, {found['num_equal_argmaxes']} of "
        f"{found['num_targets']} arg-maxes are equal ({found['threads']} threads)"
    )
    return rows, agreement


def compare_sequences(scale: Scale, folder: Path) -> tuple[list[list[str]], str]:
    """One long sequence: `run` against the bare loop, both looked at alike, and late stages against early ones."""
    script, found = str(HERE / "sequence.py"), defaultdict(list)
    worst = 0.0
    for repetition in range(scale.repetitions):
        here = folder / f"sequence-{repetition}"
        here.mkdir()
        seconds, _, ours = run_ours(SEQUENCES, scale.sequence, here)
        found["run"].append(seconds)
        found["bare"].append(timed(script, "bare", str(here / "bare.json"), *scale.sequence)[0])
        theirs = curves(json.loads((here / "bare.json").read_text()))
        for trial_id, stages in theirs.items():  # rounding grows: the first stage's end
            first = sorted(stages)[1]
            worst = max(worst, abs(ours[trial_id][first][KEYS[1]] - stages[first][KEYS[1]]))
        growth = last_line(script, "growth", *scale.sequence)
        for name, each in growth.items():
            found[name].append(median(each))
    rows = [
        row("a sequence: run, start and all, against a bare loop", "s", found["run"], found["bare"], limit=1.25),
        row("a stage: the 190th against the 10th of 200", "s", found["late_s"], found["early_s"], limit=1.1),
    ]
    return rows, f"sequence: nll at the end of the first stage differs by {worst:.0e} at most"


def compare_corpora(scale: Scale) -> tuple[list[list[str]], str]:
    """The match lengths of a corpus from one pass, against `generate` from six prefixes."""
    repetitions = f"repetitions={scale.repetitions}"
    found = last_line(str(HERE / "corpus.py"), *scale.corpus, "threads=2", repetitions)
    title = f"match lengths: one pass for {found['num_prefixes']:,} prefixes, against generate from six a sample"
    agrees = "agrees" if found["num_equal"] == found["num_compared"] else "DISAGREES"
    agreement = (
        f"corpus: the pass {agrees} with generate on {found['num_equal']} of {found['num_compared']} match lengths, of "
        f"{found['mean_match']:.1f} tokens on average and {found['longest_match']} at most ({found['threads']} threads)"
    )
    return [row(title, "s", found["pass_s"], found["generate_s"], limit=12, is_gain=True)], agreement


def shares(title: str, seconds: Mapping[str, float]) -> Table:
    table = Table("part", title=title, title_justify="left")
    for column in ("s", "%"):
        table.add_column(column, justify="right")
    for name, each in seconds.items():
        table.add_row(name, f"{each:.2f}", f"{100 * each / sum(seconds.values()):.0f}")
    return table


def run_all(scale: Scale, wanted: list[str], folder: Path) -> tuple[list[list[str]], list[Table], list[str]]:
    """The rows, the small tables, and the words on agreement."""
    rows, tables, agreement = [], [], []
    inside, seeds = str(HERE / "inside.py"), f"seeds={scale.empty_seeds}"
    if compared := [name for name in COMPARED if name in wanted]:
        rows, stages, agreement = compare_runs(scale, compared, folder)
        tables.append(shares(f"Where the time of run goes ({len(scale.sweep().trials)} trials)", stages))
    if "overhead" in wanted:
        found = last_line(inside, "overhead", str(folder / "empty"), seeds, "length=16", "epochs=1")
        empty = f"{4 * scale.empty_seeds} empty trials"
        rows.append(row(f"Tune overhead a trial ({empty}): wall time less the trials' own", "s", [found["overhead_s"]]))
        rows.append(row(f"wall time a trial ({empty}), the cluster being there", "s", [found["wall_s"]]))
    if "mlflow" in wanted:
        if not compared:
            (folder / "0").mkdir()
            run_ours(STUDY, scale.study, folder / "0")
        rates = [last_line(inside, "mlflow", str(folder / "0"), *scale.study) for _ in range(scale.repetitions)]
        rows.append(row("MLflow points a second through our Tracker", "/s", [each["points_per_s"] for each in rates]))
    if "probes" in wanted:
        rows += compare_probers(scale, folder)
    if "context" in wanted:
        found, words = compare_contexts(scale)
        rows += found
        agreement.append(words)
    if "sequence" in wanted:
        found, words = compare_sequences(scale, folder)
        rows += found
        agreement.append(words)
    if "corpus" in wanted:
        found, words = compare_corpora(scale)
        rows += found
        agreement.append(words)
    if "profile" in wanted:
        found = last_line(inside, "profile", str(folder), *scale.study)
        tables.append(shares("Where the time of one warm trial goes (one process, one thread)", found))
    return rows, tables, agreement


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a very small size, once")
    parser.add_argument("--only", choices=NAMES, nargs="+", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    arguments = parser.parse_args()
    scale, began = QUICK if arguments.quick else FULL, time.perf_counter()
    (ROOT / "build").mkdir(exist_ok=True)
    # Not in /tmp, which may be memory: the ledger and SQLite wait for their disk.
    with tempfile.TemporaryDirectory(prefix="bench-", dir=ROOT / "build") as scratch:
        rows, tables, agreement = run_all(scale, arguments.only, Path(scratch))
    title = "QUICK: these figures mean nothing" if arguments.quick else f"tiny Pythia, {', '.join(scale.study)}"
    words = [
        "Medians over the repetitions (ratio: lowest to highest).",
        "Ratio: ours to theirs where it must be at most, theirs to ours where it must be at least.",
        "*: without the start of the cluster, on both sides.",
        *agreement,
        f"{os.cpu_count()} cores, {time.perf_counter() - began:.0f} s in all.",
    ]
    table = Table("", title=title, caption="\n".join(words), title_justify="left", caption_justify="left")
    for column in ("ours", "theirs", "ratio", "required", "", "repetitions"):
        table.add_column(column, justify="right")
    for each in rows:
        table.add_row(*each)
    console = Console(width=None if sys.stdout.isatty() else 160)
    for each in (table, *tables):
        console.print(each)


if __name__ == "__main__":
    main()

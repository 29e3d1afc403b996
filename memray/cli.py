"""The command line: `python -m memray VERB`.

Exit codes: 0 all is well and every trial finished, 1 some failed or something disagrees, 2 wrong usage or an invalid
spec, 3 the cluster or the storage cannot be reached.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from memray.console import (
    err,
    out,
    plan_row,
    plan_table,
    say_where,
    watcher,
    what_overfills_memory,
    where_probes_run,
    why_placed,
)
from memray.preflight import check, download
from memray.sweep import Sweep, load

FAILED, INVALID, UNREACHABLE = 1, 2, 3
TERMINATED = 143  # as a shell says of a command that SIGTERM ended

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n\n")[0]
)
SweepFile = Annotated[str, typer.Argument(metavar="SWEEP", help="A study file, e.g. sweeps/entropy.py")]
Parameters = Annotated[
    list[str] | None, typer.Option("-p", metavar="NAME=VALUE", help="A parameter of the study's sweep(...)")
]
Storage = Annotated[
    str, typer.Option(envvar="MEMRAY_STORAGE", help="Folder or URI of the ledger", show_default="./runs")
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow; default MLFLOW_TRACKING_URI, else an SQLite file in the storage")
]
Address = Annotated[str | None, typer.Option(help="A Ray cluster; default RAY_ADDRESS, else this machine")]
FromMlflow = Annotated[bool, typer.Option("--from-mlflow", help="Read MLflow, where the storage is out of reach")]
MaxConcurrent = Annotated[int | None, typer.Option(min=1, help="Trials side by side at most")]
ProbeActors = Annotated[
    int | None,
    typer.Option(min=0, help="Actors that score snapshots; 0: each trial does; default one for 8 devices, 0 below 3"),
]


def main() -> None:
    """Runs the command line."""
    if "MEMRAY_SEALED" in os.environ:  # in a job
        from memray.cluster.sealing import unseal

        with _exit_codes():
            unseal()
    app()


def _leave(code: int, text: str) -> NoReturn:
    from memray.cluster.storage import without_passwords

    err.print(without_passwords(text), markup=False)
    raise typer.Exit(code)


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns the errors that a user can cause into their exit codes."""
    try:
        yield
    except ValueError as error:
        _leave(INVALID, str(error))
    except OSError as error:  # of which StorageError and ConnectionError are kinds
        _leave(UNREACHABLE, str(error))


def _load(path: str, parameters: list[str] | None) -> Sweep:
    """The sweep, with every cell and trial that cannot run reported at once."""
    try:
        sweep = load(path, **_named(parameters, "-p"))
        for note in check(sweep):
            err.print(note, markup=False)
    except ValueError as error:
        _leave(INVALID, str(error))
    return sweep


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no reason was given"


def _named(stated: list[str] | None, option: str) -> dict[str, str]:
    """Values by name, of an option that takes name=value."""
    if wrong := [each for each in stated or [] if "=" not in each]:
        raise ValueError(f"{option} takes name=value, but got {', '.join(wrong)}")
    return {name: value for name, _, value in (each.partition("=") for each in stated or [])}


def _ledger(storage: str, sweep: Sweep) -> Any:
    from memray.cluster.ledger import Ledger

    is_relative = "://" not in storage and not Path(storage).is_absolute()
    if is_relative and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # which Ray gives to the command of a job
        raise ValueError(
            f"inside a Ray job the storage must be absolute, but it is {storage!r}: the job's working directory is a "
            "cache that Ray deletes; set --storage or MEMRAY_STORAGE to a shared folder or a URI"
        )
    where = str(Path(storage).absolute()) if "://" not in storage else storage
    return Ledger(where, sweep.name, probes_ids=sweep.probes_ids())


@app.command()
def plan(
    sweep: SweepFile,
    parameters: Parameters = None,
    storage: Storage = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a trial")] = False,
) -> None:
    """Shows every trial, what it costs and whether it is finished; refuses what cannot run."""
    loaded = _load(sweep, parameters)
    with _exit_codes():
        ledger = _ledger(storage, loaded)
        states = ledger.states(trial.trial_id() for trial in loaded.trials)
    rows = [plan_row(trial, loaded, states[trial.trial_id()]) for trial in loaded.trials]
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    out.print(plan_table(rows, loaded))
    for line in why_placed(loaded):
        out.print(line, markup=False, soft_wrap=True)
    out.print(where_probes_run(loaded))
    for line in what_overfills_memory(loaded):
        out.print(line, markup=False, soft_wrap=True)
    left = [row for row in rows if row["state"] != "finished"]
    flops = sum(row["flops"] for row in left)
    out.print(
        f"{len(rows)} trials in {len(loaded.cells())} cells, {len(left)} to run: {flops:.3g} floating-point operations "
        f"({sum(row['probe_flops'] for row in left) / max(1.0, flops):.0%} of them to look at what was learned), "
        f"{sum(row['device_hours'] for row in left):.3g} device-hours (estimated), "
        f"at most {max(row['peak_gib'] for row in rows):.1f} GiB a device"
    )


@app.command()
def trial(sweep: SweepFile, trial_id: str, parameters: Parameters = None) -> None:
    """Runs one trial in this process, without Ray or MLflow: one JSON object a line for each measurement."""
    loaded = _load(sweep, parameters)
    with _exit_codes():
        from memray.trial import run_trial

        for measurement in run_trial(loaded.trial(trial_id)):
            typer.echo(json.dumps(measurement.record()))


@app.command()
def run(
    sweep: SweepFile,
    parameters: Parameters = None,
    address: Address = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    max_concurrent: MaxConcurrent = None,
    probe_actors: ProbeActors = None,
) -> None:
    """Runs what is not finished, shows how it goes, and prints the results and where to look."""
    _run(sweep, parameters, address, storage, tracking_uri, max_concurrent, probe_actors, adds_probes=False)


@app.command()
def probe(
    sweep: SweepFile,
    parameters: Parameters = None,
    address: Address = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    max_concurrent: MaxConcurrent = None,
    probe_actors: ProbeActors = None,
) -> None:
    """Adds probes to finished trials, from the weights that they kept or by training them again, bit for bit."""
    _run(sweep, parameters, address, storage, tracking_uri, max_concurrent, probe_actors, adds_probes=True)


def _run(
    sweep: str,
    parameters: list[str] | None,
    address: str | None,
    storage: str,
    tracking_uri: str | None,
    max_concurrent: int | None,
    probe_actors: int | None,
    *,
    adds_probes: bool,
) -> NoReturn:
    loaded = _load(sweep, parameters)
    from memray.cluster.launch import launch
    from memray.cluster.mirror import default_tracking_uri
    from memray.cluster.storage import without_passwords

    with _exit_codes():
        ledger = _ledger(storage, loaded)
        uri = tracking_uri or default_tracking_uri(storage)
        for model in download(loaded):
            out.print(f"downloaded {model}")
        mirror = _mirror(loaded, ledger, uri, storage)
        mirror.start()
        with watcher(loaded, mirror) as watching:
            outcome = launch(
                loaded,
                ledger,
                watching,
                address=address,
                max_concurrent=max_concurrent,
                probe_actors=probe_actors,
                adds_probes=adds_probes,
            )
        lag = mirror.finish(failed=len(outcome.failed), left=len(outcome.left))
    _show_results(loaded, storage)
    for trial_id, why in outcome.failed.items():
        err.print(f"trial {trial_id} failed: {_last_line(why)}", markup=False)
    say_where(mirror, lag, sweep, parameters, without_passwords(storage))
    if outcome.left:
        err.print(f"asked to leave: {len(outcome.left)} trials are not finished; the same command goes on with them")
        raise typer.Exit(TERMINATED)
    raise typer.Exit(FAILED if outcome.failed else 0)


@app.command()
def submit(
    sweep: SweepFile,
    address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="A cluster's dashboard, http://…:8265")],
    parameters: Parameters = None,
    storage: Annotated[
        str | None, typer.Option(envvar="MEMRAY_STORAGE", help="Shared folder or URI of the ledger")
    ] = None,
    tracking_uri: TrackingUri = None,
    max_concurrent: MaxConcurrent = None,
    probe_actors: ProbeActors = None,
    driver_label: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A label of the node that is to run the driver; default: the head"),
    ] = None,
    send: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variable of this shell that the job needs, such as a bucket's key"),
    ] = None,
) -> None:
    """Runs a sweep as a Ray job on a cluster, with this folder's files, and follows it to its end."""
    loaded = _load(sweep, parameters)
    from memray.cluster.mirror import git_commit
    from memray.cluster.sealing import SEALED, seal
    from memray.cluster.storage import without_passwords
    from memray.cluster.submission import Job, code_sha256, credentials, entrypoint, places, runtime_env
    from memray.cluster.submission import submit as submit_job

    with _exit_codes():
        labels = _named(driver_label, "--driver-label")
        commit = git_commit()
        about = {"MEMRAY_GIT_COMMIT": commit} if commit else {}
        variables = runtime_env({})["env_vars"]
        about |= places(
            storage or variables.get("MEMRAY_STORAGE"),
            tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or variables.get("MLFLOW_TRACKING_URI"),
        )
        shown = {name: without_passwords(value) for name, value in about.items()}
        secrets = credentials(send or ()) | {name: value for name, value in about.items() if value != shown[name]}
        sent = seal(secrets)
        if secrets and SEALED not in sent:
            err.print(f"sent as they are, for there is no token to seal them with: {', '.join(sorted(secrets))}; "
                      "Ray's agents log them", markup=False, soft_wrap=True)  # fmt: skip
        counts = {"--max-concurrent": max_concurrent, "--probe-actors": probe_actors}
        options = {name: str(value) for name, value in counts.items() if value is not None}
        command = entrypoint(sweep, parameters or [], options)
        looked_at = json.dumps(sorted(loaded.probes_ids().items()))
        job = Job(
            sweep=loaded.name,
            command=command,
            environment=runtime_env(shown | sent),
            metadata={
                "sweep": loaded.name,
                "trials": str(len(loaded.trials)),
                "trials_sha256": hashlib.sha256(looked_at.encode()).hexdigest(),
                "code_sha256": code_sha256(sweep),
                "commit": commit or "none",
            },
            driver_labels=labels,
        )
        code = submit_job(address, job, _say)
    raise typer.Exit(code)


def _say(lines: str) -> None:
    typer.echo(lines, nl=False)


def _mirror(sweep: Sweep, ledger: Any, uri: str, storage: str, *, trusts_notes: bool = True) -> Any:
    from memray.cluster.mirror import Mirror

    def write_figures(folder: Path) -> None:
        from memray.cluster.tracking import costs, results
        from memray.report import has_curriculum
        from memray.report.figure import write_sweep_figure
        from memray.report.placement_figure import write_placement_figures
        from memray.report.placements import varies_placement

        frame = results(sweep, storage=storage)
        if len(frame):
            write_sweep_figure(sweep, frame, folder)
            if has_curriculum(sweep):
                # Only here, because they need torch, which takes seconds to import.
                from memray.report.sequence_figures import write_sequence_figures

                write_sequence_figures(sweep, frame, folder)
            if varies_placement(sweep):
                write_placement_figures(sweep, frame, costs(sweep, storage=storage), folder)
            # A param that does not apply to every trial is a number for some and "none" for others.
            texts = {str(name): column.map(str) for name, column in frame.items() if column.dtype == object}
            frame.assign(**texts).to_parquet(folder / "results.parquet")

    return Mirror(sweep, ledger, uri, write_figures, trusts_notes=trusts_notes)


def _show_results(sweep: Sweep, storage: str) -> None:
    from memray.cluster.tracking import costs, results
    from memray.report.placements import placement_table, varies_placement
    from memray.report.rates import best_rates
    from memray.report.table import result_table

    frame = results(sweep, storage=storage)
    if len(frame):
        for renderable in result_table(sweep, frame):
            out.print(renderable)
        for line in best_rates(sweep, frame):
            out.print(line, markup=False, soft_wrap=True)
        if varies_placement(sweep):
            out.print(placement_table(sweep, costs(sweep, storage=storage)))


@app.command()
def status(
    sweep: SweepFile,
    parameters: Parameters = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    from_mlflow: FromMlflow = False,
) -> None:
    """Shows what is done, running, failed and planned."""
    loaded = _load(sweep, parameters)
    with _exit_codes():
        ledger = None if from_mlflow else _ledger(storage, loaded)
        if ledger is None:
            from memray.cluster.mirror import default_tracking_uri
            from memray.cluster.tracking import states as told

            states = told(loaded, tracking_uri or default_tracking_uri(storage))
        else:
            states = ledger.states(trial.trial_id() for trial in loaded.trials)
        counts = {state: list(states.values()).count(state) for state in ("finished", "running", "failed", "planned")}
        out.print(f"{loaded.name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        for trial_id, state in states.items():
            if ledger is None:
                if state in ("failed", "running"):
                    out.print(f"  {trial_id} {state}", markup=False)
            elif state == "failed":
                why = ledger.trial(trial_id).failure() or ""
                out.print(f"  {trial_id} failed: {_last_line(why)}", markup=False)
            elif state == "running":
                done = ledger.trial(trial_id).measurements()[0]
                out.print(f"  {trial_id} runs: epoch {done[-1]['epoch'] if done else 0} written", markup=False)


@app.command()
def report(
    sweep: SweepFile,
    parameters: Parameters = None,
    storage: Storage = "runs",
    tracking_uri: TrackingUri = None,
    from_mlflow: FromMlflow = False,
) -> None:
    """Writes what a sweep has shown as one HTML page, with its figures as files, and puts them on its MLflow run."""
    loaded = _load(sweep, parameters)
    from memray.cluster.mirror import code_tags, default_tracking_uri
    from memray.cluster.storage import without_passwords
    from memray.cluster.tracking import results, summaries
    from memray.report.page import write_report
    from memray.report.provenance import provenance

    if from_mlflow:
        with _exit_codes():
            uri = tracking_uri or default_tracking_uri(storage)
            read_from = {"Read from": f"MLflow at {without_passwords(uri)}, which has no single tokens and no samples"}
            stands_on = read_from | provenance(loaded, summaries(loaded, uri), code_tags())
            frame = results(loaded, tracking_uri=uri)
            page, *_ = write_report(loaded, frame, Path("report", loaded.name), provenance=stands_on)
        out.print(f"report: {page.absolute()}", soft_wrap=True, markup=False)
        return
    with _exit_codes():
        ledger = _ledger(storage, loaded)
        uri = tracking_uri or default_tracking_uri(storage)
        is_local = "://" not in storage
        folder = Path(storage, loaded.name, "report") if is_local else Path("report", loaded.name)
        frame = results(loaded, storage=storage)
        folders = [ledger.trial(trial.trial_id()) for trial in loaded.trials]
        if other := sum(each.is_added and each.finished() is None for each in folders):
            raise ValueError(
                f"a report needs all trials under the probes that the study asks for, but {other} were run under "
                "others alone; look at them again with `probe`, or restore the study's probes"
            )
        finished = [each.finished() for each in folders]
        stands_on = provenance(loaded, [each.summary for each in finished if each], code_tags())
        page, *_ = write_report(loaded, frame, folder, records=ledger.trial, provenance=stands_on)
    out.print(f"report: {page.absolute()}", soft_wrap=True, markup=False)
    mirror = _mirror(loaded, ledger, uri, storage)
    mirror.send_folder(folder, "report")
    if mirror.error is not None:
        err.print(
            f"MLflow at {mirror.shown_uri} lacks the report ({mirror.why()}); call `report` again for it", markup=False
        )


@app.command()
def sync(
    sweep: SweepFile, parameters: Parameters = None, storage: Storage = "runs", tracking_uri: TrackingUri = None
) -> None:
    """Sends MLflow what it lacks, or rebuilds it."""
    loaded = _load(sweep, parameters)
    from memray.cluster.mirror import default_tracking_uri
    from memray.cluster.storage import without_passwords

    with _exit_codes():
        ledger = _ledger(storage, loaded)
        uri = tracking_uri or default_tracking_uri(storage)
        states = ledger.states(trial.trial_id() for trial in loaded.trials)
        mirror = _mirror(loaded, ledger, uri, storage, trusts_notes=False)
        lag = mirror.finish(failed=sum(state == "failed" for state in states.values()))
    say_where(mirror, lag, sweep, parameters, without_passwords(storage))
    raise typer.Exit(UNREACHABLE if mirror.error is not None else 0)


@app.command()
def audit(
    sweep: SweepFile, parameters: Parameters = None, storage: Storage = "runs", tracking_uri: TrackingUri = None
) -> None:
    """Reconciles plan, ledger and MLflow; lists every difference and changes nothing."""
    loaded = _load(sweep, parameters)
    from memray.cluster.audit import audit as find_differences
    from memray.cluster.mirror import default_tracking_uri

    with _exit_codes():
        uri = tracking_uri or default_tracking_uri(storage)
        differences = find_differences(loaded, _ledger(storage, loaded), uri)
    for difference in differences:
        err.print(difference, markup=False)
    out.print(f"{loaded.name}: {len(loaded.trials)} trials, {len(differences)} differences")
    raise typer.Exit(FAILED if differences else 0)


@app.command()
def remeasure(
    sweep: SweepFile,
    parameters: Parameters = None,
    storage: Storage = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements, one JSON object a line")] = False,
) -> None:
    """Computes every measure again from the per-token records, without a model, and compares it with the ledger."""
    loaded = _load(sweep, parameters)
    from memray.cluster.audit import remeasured

    num_different = num_finished = 0
    with _exit_codes():
        ledger = _ledger(storage, loaded)
        for each in loaded.trials:
            folder = ledger.trial(each.trial_id())
            if folder.finished() is None:
                continue
            num_finished += 1
            records = remeasured(each, folder)
            if as_json:
                for record in records:
                    typer.echo(json.dumps(record))
            if records != folder.measurements()[0]:
                num_different += 1
                err.print(
                    f"trial {each.trial_id()}: its records give other measures than the ledger holds", markup=False
                )
    if not as_json:
        out.print(f"{loaded.name}: {num_finished} finished trials measured again, {num_different} differ")
    raise typer.Exit(FAILED if num_different else 0)

"""A sweep as a Ray job: the same command, on a cluster, with the project's files and the right environment."""

import asyncio
import hashlib
import json
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# As in a launch: a cluster outside the tests asks for its token, and Ray reads the mode when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")

import aiohttp
import yaml
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobSubmissionClient

ENVIRONMENT = Path("infra/runtime_env.yaml")
# What a job is given of the shell that submits it, where it is set: who it is to MLflow and the hub. No keys of a
# bucket unless they are named: the nodes of a cluster have their own, and those of the shell may be for something else.
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "HF_TOKEN",
)
# Seconds that the dashboard may be away from a job that is being followed. The job itself does not depend on it.
PATIENCE_S = 30.0
# What goes wrong between here and the dashboard; of Ray's own errors the one for a missing or wrong token.
_UNREACHABLE = (OSError, RuntimeError, RayError, aiohttp.ClientError)


def runtime_env(variables: Mapping[str, str]) -> dict[str, Any]:
    """The project's files and its environment on a cluster, with these variables beside or instead of its own.

    Raises:
        ValueError: If the working directory is not the project's.
    """
    if not Path("memray").is_dir() or not ENVIRONMENT.is_file():
        raise ValueError(
            f"a job carries the working directory, which must be the project's with memray/ and {ENVIRONMENT}, but "
            f"{Path.cwd()} is not; change into it"
        )
    stated: dict[str, Any] = yaml.safe_load(ENVIRONMENT.read_text()) or {}
    return stated | {"working_dir": ".", "env_vars": {**(stated.get("env_vars") or {}), **variables}}


def places(storage: str | None, tracking_uri: str | None) -> dict[str, str]:
    """The variables of a job that say where its ledger and its MLflow are. No options: these would be in its logs.

    Raises:
        ValueError: If either would lie in the job's working directory, or there is no MLflow for a bucket.
    """
    if storage is None or ("://" not in storage and not Path(storage).is_absolute()):
        found = "none is set" if storage is None else f"it is {storage!r}"
        raise ValueError(
            f"a job's storage must be absolute, but {found}: the job's working directory is a cache that Ray deletes; "
            f"set --storage, MEMRAY_STORAGE or {ENVIRONMENT} to a shared folder or a URI"
        )
    if tracking_uri is None:
        if "://" in storage:
            raise ValueError(
                # Not all of it: it may carry a password.
                f"SQLite needs a local folder, but the storage is a URI ({storage.partition('://')[0]}://…); name a "
                f"tracking server with --tracking-uri, MLFLOW_TRACKING_URI or {ENVIRONMENT}"
            )
        return {"MEMRAY_STORAGE": storage}
    scheme, _, path = tracking_uri.partition(":///")
    if scheme == "sqlite" and path and not Path(path).is_absolute():
        raise ValueError(
            f"a job's tracking database must be absolute, but it is {tracking_uri}; write sqlite:////folder/mlflow.db "
            "with four slashes, a folder of the cluster's head node"
        )
    return {"MEMRAY_STORAGE": storage, "MLFLOW_TRACKING_URI": tracking_uri}


def credentials(names: Sequence[str] = ()) -> dict[str, str]:
    """The variables of this shell that say who the job is, and others that are asked for.

    Raises:
        ValueError: If one that is asked for is not set.
    """
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ValueError(f"what is sent to a job must be set here, but {', '.join(missing)} is not; export it first")
    return {name: os.environ[name] for name in (*CREDENTIALS, *names) if os.environ.get(name)}


def code_sha256(study: str) -> str:
    """Of the project's files that a job runs, and of its study; no commit says what was changed since."""
    paths = [path for path in Path("memray").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    named = [(path.as_posix(), path) for path in sorted(paths)] + [("study", Path(study))]
    told = [(name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in named]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def entrypoint(sweep: str, parameters: list[str], options: Mapping[str, str]) -> str:
    """The command that the job runs.

    Raises:
        ValueError: If the study is not in the working directory, which is all that the job has.
    """
    path = Path(sweep).resolve()
    if not path.is_relative_to(Path.cwd()) or not path.is_file():
        raise ValueError(f"the study must be a file below {Path.cwd()}, which is what the job carries, but got {sweep}")
    words = ["python", "-m", "memray", "run", path.relative_to(Path.cwd()).as_posix()]
    for parameter in parameters:
        words += ["-p", parameter]
    for name, value in options.items():
        words += [name, value]
    return shlex.join(words)


@dataclass(frozen=True)
class Job:
    """What is submitted.

    Attributes:
        sweep: Its name, with which the job's id begins.
        command: What the job runs.
        environment: Its runtime environment.
        metadata: What Ray's list of jobs says of it.
        driver_labels: Of the node on which the command runs; without any it is the head node.
    """

    sweep: str
    command: str
    environment: Mapping[str, Any]
    metadata: Mapping[str, str]
    driver_labels: Mapping[str, str]

    def base_id(self) -> str:
        """The same for the same sweep, command, code and places, whoever submits it."""
        variables = self.environment["env_vars"]
        places = [variables.get(name) for name in ("MEMRAY_STORAGE", "MLFLOW_TRACKING_URI")]
        told = json.dumps([self.command, places, dict(self.metadata)], sort_keys=True)
        return f"{self.sweep}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def submit(address: str, job: Job, say: Callable[[str], None]) -> int:
    """Submits a job and follows it to its end; the exit code of its command, or 1 if it was stopped or never began.

    Where the same job runs already, that one is followed.

    Args:
        address: Of the cluster's dashboard, such as http://127.0.0.1:8265.
        say: Given the job's lines as they come.

    Raises:
        ConnectionError: If there is no cluster at the address, it refuses the job, or it goes away; a job that was
            submitted runs on.
        ValueError: If the working directory is too large to be carried.
        KeyboardInterrupt: If the person stops following. The job runs on, and they are told how to find it.
    """
    address = address if "://" in address else f"http://{address}"
    _check_answers(address)
    for handler in logging.getLogger("ray").handlers:  # its modules set their levels themselves
        handler.setLevel(logging.ERROR)
    # Ray lets this variable, and RAY_ADDRESS after it, override the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        client = JobSubmissionClient(address)
        job_id, is_new = _begin(client, job)
    except _UNREACHABLE as error:
        raise ConnectionError(f"the Ray cluster at {address} did not take the job: {error}") from error
    say(f"job {job_id}{'' if is_new else ' runs already'}: {job.command}\n")
    whereabouts = (
        f"job {job_id} runs on whether it is followed or not:\n"
        f"  ray job logs --address {address} --follow {job_id}\n"
        f"  ray job stop --address {address} {job_id}\n"
    )
    try:
        ended = asyncio.run(_follow(client, job_id, say))
    except KeyboardInterrupt:
        say(f"\n{whereabouts}")
        raise
    except _UNREACHABLE as error:
        raise ConnectionError(
            f"the dashboard at {address} has been away for {PATIENCE_S:.0f} s ({error}); {whereabouts.rstrip()}"
        ) from error
    say(f"job {job_id}: {ended.status.value}\n")
    if ended.driver_exit_code is None and ended.message:  # what its log cannot tell
        say(f"{ended.message}\n")
    return ended.driver_exit_code if ended.driver_exit_code in (0, 1, 2, 3) else 1


def _begin(client: JobSubmissionClient, job: Job) -> tuple[str, bool]:
    """The id of the job, and whether it was begun now: Ray takes an id once, so that each run has the next number."""
    base = job.base_id()
    by_name = {each.submission_id or "": each for each in client.list_jobs()}
    names = [name for name in by_name if re.fullmatch(rf"{re.escape(base)}-\d+", name)]
    for name in names:
        if not by_name[name].status.is_terminal():
            return name, False
    begun = client.submit_job(
        entrypoint=job.command,
        submission_id=f"{base}-{1 + max((int(name.rpartition('-')[2]) for name in names), default=0)}",
        runtime_env=dict(job.environment),
        metadata=dict(job.metadata),
        entrypoint_label_selector=dict(job.driver_labels) or None,
    )
    return begun, True


def _check_answers(address: str) -> None:
    """Refuses an address at which nobody listens, which Ray itself may try for minutes."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"the dashboard of a Ray cluster must listen at the address, but {address} does not answer ({error})"
        ) from error


async def _follow(client: JobSubmissionClient, job_id: str, say: Callable[[str], None]) -> JobDetails:
    """The job once it has ended. Each connection carries the log from its beginning, and may break before its end."""
    said, has_ended, last_heard_s = 0, False, time.monotonic()
    while True:
        broke, position = False, 0
        try:
            async for lines in client.tail_job_logs(job_id):
                say(lines[max(0, said - position) :])
                position += len(lines)
                said = max(said, position)
                last_heard_s = time.monotonic()
        except _UNREACHABLE:
            broke = True
        try:
            job = client.get_job_info(job_id)
            last_heard_s = time.monotonic()
            if job.status.is_terminal() and (has_ended or not broke):
                return job
            has_ended = job.status.is_terminal()  # its last lines are asked for once more
        except _UNREACHABLE:
            if time.monotonic() - last_heard_s > PATIENCE_S:
                raise
        await asyncio.sleep(1)

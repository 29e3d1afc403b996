"""A sweep as a Ray job: the same command, on a cluster, with the project's files and the right environment."""

import asyncio
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

ENVIRONMENT = Path("infra/runtime_env.yaml")


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


def submit(address: str, command: str, environment: dict[str, Any], say: Callable[[str], None]) -> bool:
    """Submits a job and follows it to its end; whether it succeeded.

    Args:
        address: Of the cluster's dashboard, such as http://127.0.0.1:8265.
        say: Given the job's lines as they come.

    Raises:
        ConnectionError: If there is no cluster at the address.
    """
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:
        raise ConnectionError(
            f"the dashboard of a Ray cluster must answer at the address, but {address} does not ({error})"
        ) from error
    job_id = client.submit_job(entrypoint=command, runtime_env=environment)
    say(f"job {job_id}: {command}\n")
    asyncio.run(_follow(client, job_id, say))
    status = client.get_job_status(job_id)
    say(f"job {job_id}: {status.value}\n")
    return status == JobStatus.SUCCEEDED


async def _follow(client: JobSubmissionClient, job_id: str, say: Callable[[str], None]) -> None:
    """Until the job has ended; the connection that carries its log may break before that."""
    while not client.get_job_status(job_id).is_terminal():
        async for lines in client.tail_job_logs(job_id):
            say(lines)
        await asyncio.sleep(1)

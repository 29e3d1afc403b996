"""Real servers on loopback: PostgreSQL from Debian's package, and MLflow on it, behind passwords.

Each lives as long as its `with` block, can be killed in between, and started again where it was.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import requests

from ..ports import free_port, is_listening

# Seconds that a server has to start, on a machine that is busy with other things.
START_S = 120.0
DEBIAN = Path("/usr/lib/postgresql")


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs, which Debian keeps off the PATH. Root installs them where they are missing.

    Raises:
        RuntimeError: If they are missing and cannot be installed.
    """
    if not list(DEBIAN.glob("*/bin/initdb")):
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise RuntimeError(
                f"PostgreSQL must be installed, but there is none below {DEBIAN}, and this is not root on Debian, who "
                "would install it; call `apt-get install postgresql`"
            )
        # In run level 1 the package starts no server of its own.
        environment = os.environ | {"RUNLEVEL": "1", "DEBIAN_FRONTEND": "noninteractive"}
        for words in ("update", "install --yes --no-install-recommends postgresql"):
            subprocess.run(["apt-get", "--quiet", *words.split()], env=environment, check=True, capture_output=True)
    return max(path.parent for path in DEBIAN.glob("*/bin/initdb"))


@dataclass
class Program:
    """A server that keeps its files in a folder and listens on a port."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen | None = None

    def answers(self) -> bool:
        raise NotImplementedError

    def launch(self, command: list[str], **options: Any) -> None:
        """Starts it in a process group of its own, and returns once it answers."""
        log = self.folder / "log"
        with log.open("ab") as output:
            process = self.process = subprocess.Popen(
                command, cwd=self.folder, stdout=output, stderr=output, start_new_session=True, **options
            )
        deadline = time.monotonic() + START_S
        while not self.answers():
            is_over = process.poll() is not None or time.monotonic() > deadline
            assert not is_over, f"{command[0]} did not start:\n{log.read_text()[-4000:]}"
            time.sleep(0.1)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """Signals all its processes, and returns once nobody listens on its port."""
        if self.process is not None:
            os.killpg(self.process.pid, number)
            self.process.wait(timeout=60)
            self.process = None
        while is_listening(self.port):
            time.sleep(0.1)


@dataclass
class Postgres(Program):
    """A PostgreSQL that asks for a password. It refuses to run as root, and so has a user of its own there."""

    password: str = field(default_factory=lambda: secrets.token_hex(16))

    def initialise(self) -> None:
        password_file = self.folder / "password"
        password_file.write_text(self.password)
        if self._user:
            for path in (self.folder, password_file):
                shutil.chown(path, "postgres", "postgres")
        command = [postgres_programs() / "initdb", "--pgdata=data", "--username=postgres", "--pwfile=password"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True, **self._user)

    def start(self) -> None:
        # -F leaves out the syncs that outlive a machine: only processes die here.
        command = [str(postgres_programs() / "postgres"), "-D", "data", "-F", "-h", "127.0.0.1", "-p", str(self.port)]
        self.launch([*command, "-c", "unix_socket_directories="], **self._user)

    def crash(self) -> None:
        """Ends it at once, in the middle of what it does for anybody; the next start replays its log."""
        self.stop(signal.SIGQUIT)

    @property
    def _user(self) -> dict[str, Any]:
        return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}

    def uri(self, database: str) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"

    def answers(self) -> bool:
        try:
            return self.query("postgres", "SELECT 1") == [(1,)]
        except psycopg.OperationalError:
            return False

    def query(self, database: str, text: str, **values: Any) -> list[tuple]:
        """The rows that a statement gives, if any."""
        with psycopg.connect(self.uri(database), autocommit=True, connect_timeout=10) as connection:
            found = connection.execute(text.encode(), values)
            return found.fetchall() if found.description else []


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL without databases."""
    with tempfile.TemporaryDirectory(prefix="memray-postgres-", ignore_cleanup_errors=True) as folder:
        made = Postgres(Path(folder))
        made.initialise()
        try:
            made.start()
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def s3_bucket() -> Iterator[str]:
    """URI of an empty bucket on an S3 server, with a place for a prefix."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + START_S
            while True:
                try:
                    requests.put(f"http://127.0.0.1:{port}/bucket", timeout=5).raise_for_status()
                    break
                except requests.RequestException:
                    assert time.monotonic() < deadline, "the S3 server did not start"
                    time.sleep(0.1)
            yield f"s3://test:test@bucket/{{}}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"
        finally:
            server.kill()


@dataclass
class MlflowServer(Program):
    """An MLflow server with accounts, which takes artifacts from its clients and keeps them in a bucket.

    Attributes:
        environment: Its own: where its data are, and with which passwords it gets there.
    """

    environment: dict[str, str] = field(default_factory=dict)
    admin: dict[str, str] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--allowed-hosts", f"127.0.0.1:{self.port}", "--app-name", "basic-auth", "--workers", "2"]
        command += ["--serve-artifacts", "--artifacts-destination", "s3://bucket/mlflow"]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
        self.launch(command, env=inherited | self.environment)

    def answers(self) -> bool:
        try:
            return requests.get(f"{self.uri}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def account(self, name: str) -> dict[str, str]:
        """A new account, as the environment of whoever uses it."""
        made = credentials(name)
        done = requests.post(
            f"{self.uri}/api/2.0/mlflow/users/create",
            json={"username": name, "password": made["MLFLOW_TRACKING_PASSWORD"]},
            auth=(self.admin["MLFLOW_TRACKING_USERNAME"], self.admin["MLFLOW_TRACKING_PASSWORD"]),
            timeout=60,
        )
        assert done.ok, done.text
        return made


def credentials(name: str) -> dict[str, str]:
    """A name and a new password, as MLflow's clients read them."""
    return {"MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(16)}


@contextlib.contextmanager
def mlflow_server(database: Postgres, bucket: str) -> Iterator[MlflowServer]:
    """An MLflow server on a PostgreSQL, in which it makes its databases.

    Args:
        bucket: URI of a bucket, as the fixture of that name gives it.
    """
    admin = credentials("admin")
    for name in ("tracking", "accounts"):
        database.query("postgres", f"CREATE DATABASE {name}")
    with tempfile.TemporaryDirectory(prefix="memray-mlflow-") as folder:
        settings = Path(folder) / "auth.ini"
        settings.write_text(
            "[mlflow]\n"
            "default_permission = READ\n"
            f"database_uri = {database.uri('accounts')}\n"
            f"admin_username = {admin['MLFLOW_TRACKING_USERNAME']}\n"
            f"admin_password = {admin['MLFLOW_TRACKING_PASSWORD']}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            # Without it every request costs the hash of a password, which on busy cores is a second and more.
            "auth_cache_ttl_seconds = 60\n"
        )
        environment = {
            "MLFLOW_BACKEND_STORE_URI": database.uri("tracking"),
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_S3_ENDPOINT_URL": "http://" + parse_qs(urlsplit(bucket).query)["endpoint_override"][0],
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        made = MlflowServer(Path(folder), environment=environment, admin=admin)
        try:
            made.start()
            yield made
        finally:
            made.stop()


@contextlib.contextmanager
def lossy(uri: str, lost: Callable[[str, bytes], bool]) -> Iterator[str]:
    """A way to a server on which one answer is lost, after the server has done what it was asked; the way's own URI.

    Args:
        lost: Whether the answer to a request is to be lost, by its path and its body; asked until it is.
    """
    has_lost = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Accept-Encoding")}
            answer = requests.request(self.command, uri + self.path, data=body, headers=headers, timeout=60)
            if not has_lost.is_set() and lost(self.path, body):
                has_lost.set()
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = do_PUT = do_DELETE = relay  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as way:
        threading.Thread(target=way.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{way.server_port}"
        finally:
            way.shutdown()
    assert has_lost.is_set(), "the answer that was to be lost was never given"

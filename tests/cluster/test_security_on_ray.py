"""Who listens while a sweep runs, whom a cluster lets in, and where secrets go: on real clusters and servers."""

import contextlib
import importlib
import os
import pkgutil
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from memray.cli import app

from ..ports import free_port, is_listening
from .conftest import ROOT, STUDY, StudyFolder
from .servers import MlflowServer

# --- secrets ---------------------------------------------------------------------------------------------------------

# What a shell may hold. Whoever runs a sweep needs some of them, and what a run leaves must have none.
VARIABLES = (
    "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
)  # fmt: skip
IN_STORAGE, IN_TRACKING = "the password in the storage's URI", "the password in the tracking URI"
PLANTED = {name: f"planted{secrets.token_hex(16)}" for name in (*VARIABLES, IN_STORAGE, IN_TRACKING)}


def leaks(where: str, content: bytes) -> list[str]:
    """The planted secrets in a content; of a table, which is compressed, in its values."""
    if content[:4] == b"PAR1":
        content = str(pq.read_table(pa.BufferReader(content)).to_pydict()).encode()
    return [f"{name} in {where}" for name, secret in PLANTED.items() if secret.encode() in content]


def with_password(uri: str, name: str) -> str:
    """A URI with a planted password in it, in place of one that it may have."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://someone:{PLANTED[name]}@{rest.rpartition('@')[2]}"


def leaks_below(folder: Path) -> list[str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    assert files, f"nothing was left in {folder}"
    return [leak for path in files for leak in leaks(str(path.relative_to(folder)), path.read_bytes())]


def leaks_in_bucket(uri: str) -> list[str]:
    filesystem, root = pa_fs.FileSystem.from_uri(uri)
    files = filesystem.get_file_info(pa_fs.FileSelector(root, recursive=True))
    found = []
    for each in files:
        if each.type == pa_fs.FileType.File:
            with filesystem.open_input_file(each.path) as stream:
                found += leaks(each.path, stream.read())
    assert len(files) > 5
    return found


def test_a_planted_secret_would_be_found(tmp_path: Path, finished: StudyFolder, bucket: str) -> None:
    secret = PLANTED["HF_TOKEN"]
    (tmp_path / "log").write_text(f"Authorization: Bearer {secret}\n")
    pq.write_table(pa.table({"text": ["a", secret]}), tmp_path / "table.parquet", compression="zstd")
    assert leaks_below(tmp_path) == ["HF_TOKEN in log", "HF_TOKEN in table.parquet"]
    pa_fs.copy_files(str(finished.storage / "small"), bucket.format("planted"))
    assert leaks_in_bucket(bucket.format("planted")) == []
    pa_fs.copy_files(str(tmp_path), bucket.format("planted"))
    assert len(leaks_in_bucket(bucket.format("planted"))) == 2


# --- what runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shell:
    """A person's shell on a machine where nobody has set up Ray: a home and a temporary folder of its own.

    Attributes:
        folder: With a study, a home, and all that commands say, in `told`.
        temporary: Where Ray keeps its sockets and logs; its path is short, or there would be no sockets.
        variables: What the shell has set, beside what a command needs to run at all.
    """

    folder: Path
    temporary: Path
    variables: Mapping[str, str]

    def environment(self, **more: str) -> dict[str, str]:
        foreign = ("RAY_", "MLFLOW_", "MEMRAY_", "AWS_", "HF_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        own = {"HOME": str(self.folder / "home"), "RAY_TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)}
        return inherited | own | dict(self.variables) | more

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        told = (self.folder / "told").open("a")
        return subprocess.Popen(
            [sys.executable, "-m", "memray", *words],
            cwd=self.folder, env=self.environment(**more), stdout=told, stderr=told, text=True,
        )  # fmt: skip

    def run(self, *words: str, expect: int = 0, **more: str) -> None:
        code = self.start(*words, **more).wait(timeout=280)
        assert code == expect, f"{words} left with {code}:\n{self.told()[-4000:]}"

    def told(self) -> str:
        return (self.folder / "told").read_text()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    (tmp_path / "home").mkdir()
    (tmp_path / "small.py").write_text(STUDY)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        yield Shell(tmp_path, Path(temporary), {})


@pytest.fixture
def planted_shell(shell: Shell) -> Shell:
    """With every secret in its environment. Of those for MLflow the ones in a URI win; the bucket takes any key."""
    own = {name: PLANTED[name] for name in VARIABLES} | {"MLFLOW_TRACKING_USERNAME": "someone"}
    return Shell(shell.folder, shell.temporary, own | {"AWS_ACCESS_KEY_ID": "test"})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bucket: str) -> Iterator[MlflowServer]:
    """MLflow behind a password, on SQLite, and on a bucket for its artifacts."""
    folder = tmp_path_factory.mktemp("server")
    admin = {"MLFLOW_TRACKING_USERNAME": "someone", "MLFLOW_TRACKING_PASSWORD": PLANTED[IN_TRACKING]}
    (folder / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{folder}/accounts.db\nadmin_username = someone\n"
        f"admin_password = {PLANTED[IN_TRACKING]}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\nauth_cache_ttl_seconds = 60\n"
    )
    endpoint = parse_qs(urlsplit(bucket).query)["endpoint_override"][0]
    environment = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/tracking.db",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_S3_ENDPOINT_URL": f"http://{endpoint}",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    made = MlflowServer(folder, environment=environment, admin=admin)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def leaks_of(server: MlflowServer) -> list[str]:
    """In what the server keeps and says; its own settings are where its password is meant to be."""
    return [each for each in leaks_below(server.folder) if "auth.ini" not in each]


# --- who listens, and who is let in ----------------------------------------------------------------------------------

# Ray's own processes, whose sockets are on every interface whatever is set; and of ours, the one that each process has
# through which Ray reaches it.
DAEMONS = {"gcs_server", "raylet", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "dashboard.py", "monitor.py"}
OURS = {"driver", "worker"}
# The only thing that is shown to everybody: figures for Prometheus.
METRICS = {"ray::DashboardAgent", "dashboard.py", "monitor.py"}
# Ray's own list of what can be asked lacks them.
OBJECT_MANAGER = [f"/ray.rpc.ObjectManagerService/{verb}" for verb in ("Push", "Pull", "FreeObjects")]


@dataclass(frozen=True)
class Listener:
    """A socket on which a process takes connections from elsewhere."""

    kind: str
    pid: int
    host: str
    port: int


def listeners(driver: psutil.Process) -> set[Listener]:
    """Those of a launch, of what it started, and of what these did."""
    found = set()
    for process in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline() or [process.name()]
            scripts = [Path(word).name for word in words[:4] if word.endswith(("dashboard.py", "monitor.py"))]
            if process == driver:
                kind = "driver"
            elif words[0].split()[0].rstrip("\0") in DAEMONS or Path(words[0]).name in DAEMONS:
                kind = Path(words[0].split()[0]).name
            else:
                kind = scripts[0] if scripts else "worker" if words[0].startswith("ray::") else " ".join(words)[:80]
            for each in process.net_connections(kind="inet"):
                if each.status == psutil.CONN_LISTEN and each.laddr.ip not in ("127.0.0.1", "::1"):
                    host = "127.0.0.1" if each.laddr.ip in ("::", "0.0.0.0") else each.laddr.ip
                    found.add(Listener(kind, process.pid, host, each.laddr.port))
    return found


def methods() -> list[str]:
    """Everything that Ray's processes can be asked over gRPC."""
    import ray.core.generated as generated

    names = [each.name for each in pkgutil.iter_modules(generated.__path__) if each.name.endswith("_pb2")]
    modules = [importlib.import_module(f"ray.core.generated.{name}") for name in names]
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    found = [f"/{service.full_name}/{method.name}" for service in services for method in service.methods]
    assert len(found) > 100
    return [*found, *OBJECT_MANAGER]


def answers(listener: Listener, asked: list[str], token: str | None = None) -> Counter[str]:
    """What a port says to each question, asked with a token or without; "no gRPC" where it does not speak that."""
    import grpc

    metadata = (("authorization", f"Bearer {token}"),) if token else None
    found: Counter[str] = Counter()
    with grpc.insecure_channel(f"{listener.host}:{listener.port}") as channel:
        for method in asked:
            try:
                channel.unary_unary(method)(b"", timeout=20, metadata=metadata)
                found["OK"] += 1
            except grpc.RpcError as error:
                code = error.code().name  # type: ignore[attr-defined]
                if code == "UNAVAILABLE":
                    return Counter({"no gRPC": 1})
                found[code] += 1
    return found


def http_status(listener: Listener, method: str) -> int:
    request = urllib.request.Request(f"http://{listener.host}:{listener.port}/", method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


JOIN = """
import sys, ray
ray.init(address=sys.argv[1], logging_level=40, log_to_driver=False)
print("joined", ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.mark.fault
def test_a_run_opens_no_socket_but_rays_and_those_let_nobody_in_without_the_token(shell: Shell) -> None:
    """Nothing about Ray is set, as in a new shell."""
    process = shell.start("run", "small.py", "-p", "seeds=1", "-p", "epochs=3000", "--storage", "runs")
    tree = psutil.Process(process.pid)
    started: set[psutil.Process] = set()
    try:
        deadline = time.monotonic() + 200
        found: set[Listener] = set()
        while "worker" not in {each.kind for each in found if "trials to run" in shell.told()}:
            assert process.poll() is None, shell.told()
            assert time.monotonic() < deadline, "no trial was begun"
            time.sleep(0.2)
            found |= listeners(tree)
        started |= {*tree.children(recursive=True)}
        open_now = listeners(tree)
        (gcs,) = [each for each in open_now if each.kind == "gcs_server"]
        token = (shell.folder / "home" / ".ray" / "auth_token").read_text().strip()

        assert {each.kind for each in found} <= DAEMONS | OURS
        assert {"gcs_server", "raylet", "driver", "worker"} <= {each.kind for each in open_now}
        of_ours = Counter(each.pid for each in open_now if each.kind in OURS)
        assert set(of_ours.values()) == {1}, "a process of ours listens on more than Ray's socket"
        for listener in open_now:
            said = answers(listener, methods())
            if listener not in listeners(tree):
                continue  # an idle process of Ray's that has ended since
            if said != {"no gRPC": 1}:
                assert said.keys() <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}, (listener, said)
                is_asked = said["UNAUTHENTICATED"] > 0
                assert is_asked or listener.kind == "raylet", listener  # the object manager, which hides its verbs
            else:
                assert http_status(listener, "POST") in (401, 405, 501), listener
                assert listener.kind in METRICS or http_status(listener, "GET") == 401, listener
        ask = ["/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"]
        assert answers(gcs, ask, token) == {"OK": 1}
        assert answers(gcs, ask, token[::-1]) == {"UNAUTHENTICATED": 1}

        address = f"{gcs.host}:{gcs.port}"
        other = {"HOME": str(shell.temporary), "RAY_AUTH_MODE": "disabled"}
        refused = subprocess.run(
            [sys.executable, "-c", JOIN, address], env=shell.environment(**other), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert (refused.returncode, "joined" in refused.stdout) == (1, False)
        assert "Authentication token is missing or incorrect" in refused.stdout + refused.stderr

        file = shell.folder / "home" / ".ray" / "auth_token"
        private = [stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 for path in (file, file.parent)]
        assert any(private), "others on this machine can read the token"
    finally:
        started |= {tree, *tree.children(recursive=True)} if process.poll() is None else set()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        for each in started:
            with contextlib.suppress(psutil.Error):
                each.kill()
        process.wait(timeout=60)


# --- where secrets go ------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_sweep_in_a_folder_leaves_no_secret(planted_shell: Shell) -> None:
    shell = planted_shell
    for verb in ("run", "report"):
        shell.run(verb, "small.py", "-p", "seeds=1", "--storage", "runs")
    assert leaks_below(shell.folder) == []
    assert leaks_below(shell.temporary) == []


# What is said of servers that are away, and of storages that cannot be, goes to logs too.
AWAY = with_password("http://127.0.0.1:9", IN_TRACKING)
NOWHERE = with_password("s3://bucket/runs?scheme=http&endpoint_override=127.0.0.1:9&region=us-east-1", IN_STORAGE)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, ["sync", "--tracking-uri", AWAY]),
        (3, ["run", "--storage", NOWHERE, "--tracking-uri", AWAY]),
        (2, ["run", "--storage", NOWHERE]),
        # The keys of buckets have slashes, which must not stand so in a URI.
        (2, ["plan", "--storage", NOWHERE.replace("planted", "a/planted")]),
        (2, ["plan", "--storage", NOWHERE.replace("@bucket", "/a@bucket")]),
        (2, ["plan", "--storage", NOWHERE.replace("s3://", "nothing://")]),
    ],
)
def test_what_goes_wrong_is_told_without_passwords(
    code: int, words: list[str], finished: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, PLANTED[name])
    verb, *options = words
    storage = [] if "--storage" in options else ["--storage", str(finished.storage)]
    done = CliRunner().invoke(app, [verb, str(finished.folder / finished.study), *options, *storage])
    assert (done.exit_code, type(done.exception)) == (code, SystemExit), done.output
    assert done.stderr
    assert leaks("what was said", done.output.encode()) == []


@pytest.mark.fault
def test_a_sweep_in_a_bucket_and_on_a_server_leaves_no_secret(
    planted_shell: Shell, server: MlflowServer, bucket: str
) -> None:
    shell = planted_shell
    places = ["--storage", with_password(bucket.format("secrets"), IN_STORAGE)]
    places += ["--tracking-uri", with_password(server.uri, IN_TRACKING)]
    for verb in ("run", "report", "audit"):
        shell.run(verb, "small.py", "-p", "seeds=1", *places)
    assert "2 trials, 0 differences" in shell.told()
    assert leaks_below(shell.folder) == []
    assert leaks_in_bucket(bucket.format("secrets")) == []
    assert leaks_in_bucket(bucket.format("mlflow")) == []
    assert leaks_of(server) == []
    assert leaks_below(shell.temporary) == []


@contextlib.contextmanager
def head_with_token(shell: Shell, client_port: int) -> Iterator[str]:
    """`ray start --head` as the README says, with the shell's token; the address of its dashboard."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port")}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=3", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [f"--ray-client-server-port={client_port}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={shell.temporary}"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": PLANTED["RAY_AUTH_TOKEN"]}
    environment = {name: value for name, value in shell.environment().items() if name not in VARIABLES}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    before = {each.pid for each in psutil.process_iter()}
    done = subprocess.run(command, env=environment | token, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        deadline = time.monotonic() + 100
        while not (is_listening(ports["dashboard-agent-listen-port"]) and is_listening(client_port)):
            assert time.monotonic() < deadline, "the head node's agent, which takes jobs, or its clients' port is deaf"
            time.sleep(0.3)
        yield f"http://127.0.0.1:{ports['dashboard-port']}"
    finally:
        for each in psutil.process_iter(["cmdline"]):
            if each.pid not in before and str(shell.temporary) in " ".join(each.info["cmdline"] or []):
                for process in (*each.children(recursive=True), each):
                    with contextlib.suppress(psutil.Error):
                        process.kill()


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_submit_asks_for_the_token_and_its_job_leaves_no_secret(
    planted_shell: Shell, server: MlflowServer, bucket: str
) -> None:
    shell = planted_shell
    for name in ("memray", "infra"):
        shutil.copytree(ROOT / name, shell.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without a password: the trials' actors need the keys of the environment.
    places = ["--storage", bucket.format("job").replace("test:test@", "")]
    places += ["--tracking-uri", with_password(server.uri, IN_TRACKING)]
    with head_with_token(shell, client_port := free_port()) as address:
        # What a cluster's head has beside what `run` starts: Ray's own clients run code there.
        asked = [method for method in methods() if method.startswith("/ray.rpc.RayletDriver/")]
        refused = answers(Listener("client server", 0, "127.0.0.1", client_port), asked)
        assert refused == {"UNAUTHENTICATED": len(asked)}
        assert asked
        submit = ["submit", "small.py", "-p", "seeds=1", "--address", address, *places]
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            submit += ["--send", name]
        shell.run(*submit, expect=3, RAY_AUTH_TOKEN="another", PYTHONPATH="")
        shell.run(*submit, PYTHONPATH="")
        told = shell.told()
        logs = leaks_below(shell.temporary)
    assert "2 trials to run" in told
    assert "lacks" not in told, told
    assert leaks("what was said", told.encode()) == []
    assert leaks_in_bucket(bucket.format("job")) == []
    assert leaks_in_bucket(bucket.format("mlflow")) == []
    assert leaks_of(server) == []
    assert logs == []

"""Do the commands of `infra/` and of the guides exist, with each of their flags, in the pinned versions?

Ray, MLflow and this project are asked; for three that run in images alone their flags stand here. What is called on a
machine is run, where a test can do so. Unchecked are `wget` in health checks, Docker, kubectl, Helm, ssh and aws.
"""

import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow.cli
import pytest
import typer
from ray.scripts.scripts import cli as ray_cli

from memray.cli import app

from .cluster.servers import postgres_programs
from .test_infra import INFRA, PINNED, ROOT, document, documents, walk


def with_flags(name: str, flags: set[str]) -> Any:
    """A program that cannot be asked here, as one that can."""
    return SimpleNamespace(name=name, params=[SimpleNamespace(opts=sorted(flags), secondary_opts=[])])


PG_ISREADY = {"--dbname", "--quiet", "--version", "--help", "--host", "--port", "--timeout", "--username"}
# Those of prometheus/prometheus, cmd/prometheus/main.go, that are used here.
PROMETHEUS = with_flags("prometheus", {"--config.file", "--web.listen-address"})
PROGRAMS: dict[tuple[str, ...], Any] = {
    ("ray",): ray_cli,
    ("mlflow",): mlflow.cli.cli,
    ("python", "-m", "memray"): typer.main.get_command(app),
    ("pg_isready",): with_flags("pg_isready", PG_ISREADY),
    ("mini",): with_flags("mini", {"-dir"}),  # that of seaweedfs/seaweedfs, weed/command/mini.go, that is used here
}
# Words that end a command.
ENDS = {"&&", "||", ";", "|", "&", "(", ")"}


def commands(text: str) -> Iterator[tuple[Any, list[str]]]:
    """The calls of these programs in some shell, each as a program and its words."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(re.sub(r"\$?(&&|\|\||[;|&()])", r" \1 ", line), comments=True)
        except ValueError:  # prose with an apostrophe
            continue
        for start in range(len(words)):
            for call, program in PROGRAMS.items():
                rest = words[start + len(call) :]
                is_called = start == 0 or words[start - 1] in ENDS | {"exec", "--", "CMD"}
                if tuple(words[start : start + len(call)]) == call and is_called and rest:
                    ends = [number for number, word in enumerate(rest) if word in ENDS | {"--"}]
                    yield program, rest[: min(ends, default=len(rest))]


def unknown(program: Any, words: list[str]) -> list[str]:
    """What a program does not know of the words it is called with."""
    wrong = []
    for word in words:
        if hasattr(program, "commands") and not word.startswith("-"):
            known = program.commands.get(word)
            if known is None:
                return [*wrong, word]
            program = known
        elif word.startswith("-") and len(word) > 1:
            options = {name for each in program.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
            if word.partition("=")[0] not in options:
                wrong.append(word)
    return wrong


def shell_of_documents(file: str) -> Iterator[str]:
    """Every text in a YAML file that may hold a command, and those that are given as lists of words."""
    for each in walk(documents(file)):
        for key, value in each.items():
            if isinstance(value, str) and key != "value":  # that of a variable
                yield value
            elif isinstance(value, list) and all(isinstance(word, str) for word in value):
                yield from [shlex.join(value)] if key in ("command", "args", "test") else value


def shell_of(path: Path) -> list[str]:
    text = path.read_text()
    if path.suffix == ".yaml":
        in_comments = re.findall(r"(?m)^#\s{2,}(\S.*)", text)
        return [*shell_of_documents(str(path.relative_to(INFRA))), *in_comments]
    if path.suffix == ".md":
        return [*re.findall(r"(?s)```\n(.*?)```", text), *re.findall(r"`([^`\n]+)`", text)]
    return [re.sub(r"(?m)^(RUN|CMD) ", "", text)]


FILES = sorted(
    path
    for path in [*INFRA.rglob("*"), ROOT / "README.md"]
    if path.name == "Dockerfile" or path.suffix in (".yaml", ".md", ".sh")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_and_flag_exists_in_the_pinned_version(path: Path) -> None:
    for text in shell_of(path):
        for program, words in commands(text):
            assert not unknown(program, words), f"{program.name} {shlex.join(words)}"


def test_the_commands_are_found() -> None:
    found = {str(path.relative_to(ROOT)): sum(1 for text in shell_of(path) for _ in commands(text)) for path in FILES}
    expected = {"infra/README.md": 12, "infra/ray-cluster.yaml": 5, "infra/kuberay/rayjob.yaml": 1, "README.md": 10}
    expected |= {"infra/tracking/compose.yaml": 2, "infra/tracking/kubernetes.yaml": 3}
    for file, count in (expected | {"infra/tracking/serve.sh": 1, "infra/runtime_env.yaml": 2}).items():
        assert found[file] >= count, (file, found[file])


@pytest.mark.parametrize(
    ("planted", "wrong"),
    [
        ("ray start --head --dashbord-host=127.0.0.1", ["--dashbord-host=127.0.0.1"]),
        ("ray stop && ray strat --head", ["strat"]),
        ("exec mlflow server --allowed-host x", ["--allowed-host"]),
        ("ray job submit --adress x -- python -m memray run x.py --storag y", ["--adress", "--storag"]),
        ("python -m memray sumbit sweeps/x.py", ["sumbit"]),
        ("ssh h@$(ray get-head-ip --x c.yaml)", ["--x"]),
        ("CMD pg_isready --usernam=mlflow --dbname=mlflow", ["--usernam=mlflow"]),
        ("mini -dirs=/data", ["-dirs=/data"]),
    ],
)
def test_a_planted_flag_or_command_is_found_out(planted: str, wrong: list[str]) -> None:
    assert [each for program, words in commands(planted) for each in unknown(program, words)] == wrong


def test_what_kuberay_hands_to_ray_start_exists() -> None:
    for spec in (
        document("kuberay/raycluster.yaml")["spec"],
        document("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    ):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            flags = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
            assert flags
            assert not unknown(ray_cli, ["start", *flags])
    assert unknown(ray_cli, ["start", "--num-cpu=0"])


def test_prometheus_is_started_with_flags_that_it_has() -> None:
    command = document("monitoring/compose.yaml")["services"]["prometheus"]["command"]
    assert command
    assert not unknown(PROMETHEUS, command)
    assert unknown(PROMETHEUS, ["--web.listen-adress=127.0.0.1:9090"])


@pytest.mark.fault
def test_the_flags_of_pg_isready_are_those_that_it_says_itself() -> None:
    """Those of Debian's package, which may be older than the image."""
    done = subprocess.run([postgres_programs() / "pg_isready", "--help"], capture_output=True, text=True, check=True)
    assert set(re.findall(r"--[a-z]+", done.stdout)) == PG_ISREADY


def test_shell_scripts_can_be_read() -> None:
    scripts = sorted(INFRA.rglob("*.sh"))
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["sh", "-n", str(script)], check=True)


# --- What is called on a machine ------------------------------------------------------------------


def test_a_notice_that_a_spot_instance_is_taken_empties_its_node(tmp_path: Path) -> None:
    """A server in the place of Amazon's gives the notice when it is asked for the second time, by who shows a token."""
    asked: list[str] = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self._answer(200, b"a-token")

        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['X-aws-ec2-metadata-token']}")
            self._answer(200 if len(asked) == 2 else 404, b'{"action": "terminate"}')

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    shutil.copy(INFRA / "leave_on_spot_notice.sh", tmp_path)
    (tmp_path / "leave_node.py").write_text("import sys\nprint('leaves in', sys.argv[1])\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"METADATA": f"http://127.0.0.1:{server.server_port}/latest"}
        done = subprocess.run(
            ["sh", str(tmp_path / "leave_on_spot_notice.sh")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown()
    assert done.stdout == "leaves in 60\n", done.stderr
    assert asked == ["/latest/meta-data/spot/instance-action a-token"] * 2


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_the_image_s_install_commands_work_in_a_fresh_environment(tmp_path: Path) -> None:
    """The profiler that is named memray stands there, and is gone afterwards; the pinned versions can be imported."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "memray>=1"], check=True, timeout=300)
    assert (python.parent / "memray").exists()
    environment["PATH"] = f"{python.parent}:{ninja_alone(tmp_path)}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", str(INFRA / "install.sh")], env=environment, capture_output=True, text=True, timeout=1700, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = "import deepspeed, mlflow, peft, ray, torch, transformers; print(ray.__version__, mlflow.__version__)"
    done = subprocess.run(
        [python, "-c", said], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2:] == [PINNED["ray"], PINNED["mlflow"]]
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    installed = dict(re.findall(r"(?m)^([\w.-]+)==([^+\s]+)", frozen))
    assert installed["torch"] == PINNED["torch"]
    assert installed["deepspeed"] == PINNED["deepspeed"]
    assert "memray" not in frozen
    assert not (python.parent / "memray").exists()


def ninja_alone(folder: Path) -> Path:
    """A folder with ninja and nothing else: here it is a package, and lies in a folder with all other programs."""
    found = shutil.which("ninja", path=f"{ROOT / '.venv/bin'}:{os.environ['PATH']}")
    assert found, "ninja must be installed"
    (folder / "bin").mkdir()
    (folder / "bin/ninja").symlink_to(found)
    return folder / "bin"

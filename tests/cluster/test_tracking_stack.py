"""Does `infra/tracking/serve.sh`, which the image runs, start MLflow on PostgreSQL and a bucket, behind a password?"""

import os
import re
import signal
import sys
from pathlib import Path

import psutil
import pytest
import requests
from mlflow.tracking import MlflowClient

from ..test_infra import INFRA, document
from .servers import Program, postgres

USER, PASSWORD = "admin", "correct-horse-battery-staple"


class Stack(Program):
    def answers(self) -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/health", timeout=5).ok
        except OSError:
            return False


@pytest.mark.fault
def test_the_tracking_server_starts_as_in_its_image_and_shows_nothing_without_the_password(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [store] = re.findall(r"endpoint_override=([\d.:]+)", bucket)
    stack = Stack(tmp_path)
    url = f"http://127.0.0.1:{stack.port}"
    with postgres() as database:
        database.query("postgres", "CREATE DATABASE mlflow")
        there = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(database.port),
            "PGUSER": "postgres",
            "PGPASSWORD": database.password,
        }
        there |= {"AWS_ENDPOINT_URL": f"http://{store}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        there |= {"MLFLOW_AUTH_ADMIN_USERNAME": USER, "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD}
        there |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": "signs forms", "BUCKETS": "artifacts runs"}
        said = document("tracking/compose.yaml")["services"]["mlflow"]["environment"]
        assert set(there) - {"PGPORT"} <= set(said)  # so that the file leaves out none
        plain = {name: value for name, value in said.items() if "$" not in value and name not in there}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(tmp_path), "PORT": str(stack.port)}
        try:
            stack.launch(["sh", str(INFRA / "tracking/serve.sh")], env=environment | plain | there)
            shown = " ".join(word for each in psutil.process_iter(["cmdline"]) for word in each.info["cmdline"] or [])
            listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            ours = {each.laddr.ip for each in listening if each.laddr and each.laddr.port == stack.port}
            assert ours == {"127.0.0.1"}
            assert PASSWORD not in shown
            assert database.password not in shown
            search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
            assert requests.get(search).status_code == 401
            assert requests.get(search, auth=(USER, "password1234")).status_code == 401
            for host, code in {"mlflow:5000": 200, "localhost": 200, "evil.example": 403}.items():
                assert requests.get(search, auth=(USER, PASSWORD), headers={"Host": host}).status_code == code, host
            assert requests.get(f"{url}/health", headers={"Host": "10.0.0.7:5000"}).ok  # as Kubernetes asks
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
            client = MlflowClient(url)
            run = client.create_run(client.create_experiment("small"))
            client.log_text(run.info.run_id, "hello", "figures/a.txt")
            [kept] = requests.get(f"http://{store}/artifacts?list-type=2&prefix=1/").text.split("<Key>")[1:]
            assert kept.partition("<")[0].endswith(f"{run.info.run_id}/artifacts/figures/a.txt")
            assert "<Name>runs</Name>" in requests.get(f"http://{store}/").text
            assert database.query("mlflow", "SELECT count(*) FROM runs") == [(1,)]
        finally:
            stack.stop(signal.SIGKILL)

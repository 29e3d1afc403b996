"""Is what `infra/` says understood by those who read it, safe, and true of the pinned versions? Nothing is started."""

import copy
import importlib.resources
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES
from referencing import Registry, Resource

import memray
from memray.cluster import metrics
from memray.cluster.leaving import GRACE_S

ROOT = Path(memray.__path__[0]).parent
INFRA = ROOT / "infra"
KUBERNETES = "1.32"
PINNED = dict(
    line.split("==") for line in (INFRA / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)
# Names of variables whose values are nobody's business.
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN$|ACCESS_KEY|_KEY$")
# A variable that a text gives a value of its own, as a shell, a command line or YAML does.
GIVEN = re.compile(r"\b([A-Z][A-Z0-9_]*)['\"]?\s*[=:](?!\?)\s*(?=[^\s$])")
COMPOSE_FILES = ["tracking/compose.yaml", "monitoring/compose.yaml"]
MANIFESTS = [
    "kuberay/raycluster.yaml",
    "kuberay/rayjob.yaml",
    "kuberay/network-policy.yaml",
    "tracking/kubernetes.yaml",
    "monitoring/podmonitor.yaml",
]


def documents(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / file).read_text()))


def document(file: str) -> dict[str, Any]:
    return documents(file)[0]


def of_kind(kind: str) -> Iterator[dict[str, Any]]:
    """The manifests of one kind."""
    for file in MANIFESTS:
        yield from (each for each in documents(file) if each["kind"] == kind)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a document."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from walk(each)


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a document that are no keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_of(each)


def texts() -> Iterator[tuple[Path, str]]:
    for path in sorted(INFRA.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(INFRA), path.read_text()


def refused_after(change: Callable[[Any], None], value: Any, check: Callable[[Any], None]) -> None:
    """Shows that a check can fail: it takes a document as it is, and not after a change."""
    check(value)
    changed = copy.deepcopy(value)
    change(changed)
    with pytest.raises((ValidationError, AssertionError)):
        check(changed)


# --- Schemas --------------------------------------------------------------------------------------


def schema_of(kind: str) -> Draft202012Validator:
    """A custom resource's schema, with Kubernetes' own strict definitions in it."""
    folder = importlib.resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    resource = Resource.from_contents(definitions)
    ours = yaml.safe_load((ROOT / "tests/infra_schemas/crds.yaml").read_text())
    registry = Registry().with_resource("/api/_definitions.json", resource)
    return Draft202012Validator(ours | {"$ref": f"#/$defs/{kind}"}, registry=registry)


def check_manifest(manifest: dict[str, Any]) -> None:
    if manifest["kind"] in ("RayCluster", "RayJob", "PodMonitor"):
        schema_of(manifest["kind"]).validate(manifest)
    else:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            raise ValidationError(error.message) from error


@pytest.mark.parametrize("file", MANIFESTS)
def test_every_manifest_satisfies_its_strict_schema(file: str) -> None:
    for manifest in documents(file):
        check_manifest(manifest)


def misspell(*path: str | int) -> Callable[[Any], None]:
    """Adds an s to the last key of a path."""

    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[f"{path[-1]}s"] = value.pop(path[-1])

    return change


def put(found: Any, *path: str | int) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = found

    return change


POD = ("template", "spec")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("kuberay/raycluster.yaml", misspell("spec", "authOptions")),
        ("kuberay/raycluster.yaml", misspell("spec", "authOptions", "mode")),
        ("kuberay/raycluster.yaml", misspell("spec", "workerGroupSpecs", 1, "minReplicas")),
        ("kuberay/raycluster.yaml", misspell("spec", "headGroupSpec", *POD, "terminationGracePeriodSeconds")),
        ("kuberay/raycluster.yaml", misspell("spec", "headGroupSpec", *POD, "containers", 0, "lifecycle", "preStop")),
        ("kuberay/raycluster.yaml", put("a=b", "spec", "headGroupSpec", "rayStartParams", "labels")),
        ("kuberay/raycluster.yaml", put(0, "spec", "headGroupSpec", "rayStartParams", "num-cpus")),
        ("kuberay/rayjob.yaml", misspell("spec", "deletionStrategy", "deletionRules", 0, "condition", "jobStatus")),
        ("kuberay/rayjob.yaml", misspell("spec", "rayClusterSpec", "headGroupSpec", *POD, "nodeSelector")),
        ("kuberay/rayjob.yaml", put(True, "spec", "shutdownAfterJobFinishes")),
        (
            "kuberay/rayjob.yaml",
            put("STOPPED", "spec", "deletionStrategy", "deletionRules", 0, "condition", "jobStatus"),
        ),
        ("kuberay/network-policy.yaml", misspell("spec", "ingress", 1, "ports")),
        ("tracking/kubernetes.yaml", misspell("spec", *POD, "containers", 0, "readinessProbe")),
        ("tracking/kubernetes.yaml", misspell("spec", *POD, "containers", 0, "env", 3, "valueFrom", "secretKeyRef")),
        ("monitoring/podmonitor.yaml", misspell("spec", "podMetricsEndpoints", 0, "interval")),
    ],
)
def test_a_planted_mistake_in_a_manifest_is_refused(file: str, change: Callable[[Any], None]) -> None:
    refused_after(change, document(file), check_manifest)


def check_ray_cluster(config: dict[str, Any]) -> None:
    validate_config(prepare_config(copy.deepcopy(config)))


def test_ray_takes_the_file_for_ray_up() -> None:
    refused_after(misspell("docker", "run_options"), document("ray-cluster.yaml"), check_ray_cluster)
    refused_after(misspell("head_start_ray_commands"), document("ray-cluster.yaml"), check_ray_cluster)
    prepared = prepare_config(document("ray-cluster.yaml"))
    # Ray's defaults would install Ray from the network on every node.
    assert prepared["setup_commands"] == prepared["head_setup_commands"] == prepared["worker_setup_commands"] == []


def check_compose(compose: dict[str, Any]) -> None:
    schema = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_compose_files_satisfy_the_specification_of_compose(file: str) -> None:
    name = next(iter(document(file)["services"]))
    refused_after(misspell("services", name, "healthcheck", "interval"), document(file), check_compose)


def test_prometheus_is_given_what_it_knows() -> None:
    refused_after(
        misspell("scrape_configs", 0, "file_sd_configs"),
        document("monitoring/prometheus.yaml"),
        schema_of("Prometheus").validate,
    )
    [files] = [each["files"] for each in document("monitoring/prometheus.yaml")["scrape_configs"][0]["file_sd_configs"]]
    assert files == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


# --- Nodes ----------------------------------------------------------------------------------------


def test_of_virtual_machines_head_and_drivers_stay_and_gpu_nodes_are_at_the_spot_price() -> None:
    gpu, driver = ("available_node_types", "gpu"), ("available_node_types", "driver")
    refused_after(put(0, *gpu, "min_workers"), document("ray-cluster.yaml"), check_sizes)
    refused_after(
        put({"MarketType": "spot"}, *driver, "node_config", "InstanceMarketOptions"),
        document("ray-cluster.yaml"),
        check_sizes,
    )


def check_sizes(config: dict[str, Any]) -> None:
    """Head and drivers stay, GPU nodes are at the spot price, and some are there from the beginning."""
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    is_spot = {name: "InstanceMarketOptions" in each["node_config"] for name, each in types.items()}
    assert is_spot == {"head": False, "driver": False, "gpu": True}
    for name, each in types.items():
        assert each["labels"] == {"ray.io/market-type": "spot" if is_spot[name] else "on-demand"}
        assert (each["resources"].get("GPU", 0) > 0) == is_spot[name]
    # A launch refuses a cluster in which no trial fits now.
    assert types["gpu"]["min_workers"] >= 1
    assert types["driver"]["min_workers"] >= 1
    assert types["head"]["resources"]["CPU"] == 0
    assert config["max_workers"] == sum(each.get("max_workers", 0) for each in types.values())


def ray_groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": spec["headGroupSpec"]} | {each["groupName"]: each for each in spec["workerGroupSpecs"]}


def test_on_kubernetes_head_and_drivers_stay_and_gpu_pods_are_on_spot_nodes() -> None:
    groups = ray_groups(document("kuberay/raycluster.yaml")["spec"])
    assert list(groups) == ["head", "driver", "gpu"]
    for name, group in groups.items():
        market = "spot" if name == "gpu" else "on-demand"
        pod = group["template"]["spec"]
        assert group["labels"] == {"ray.io/market-type": market}
        assert pod["nodeSelector"]["karpenter.sh/capacity-type"] == market
        stays = group["template"]["metadata"].get("annotations", {})
        assert (stays.get("karpenter.sh/do-not-disrupt") == "true") == (name != "gpu")
        assert bool(pod.get("tolerations")) == (name == "gpu")
        assert ("nvidia.com/gpu" in pod["containers"][0]["resources"]["limits"]) == (name == "gpu")
        if name != "head":
            assert 1 <= group["minReplicas"] == group["replicas"] == group["maxReplicas"]
    assert groups["head"]["rayStartParams"]["num-cpus"] == "0"


def test_the_cluster_for_one_sweep_is_the_cluster_that_stays() -> None:
    job, cluster = document("kuberay/rayjob.yaml")["spec"], document("kuberay/raycluster.yaml")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert job["backoffLimit"] == 0
    conditions = [rule["condition"] for rule in job["deletionStrategy"]["deletionRules"]]
    # KubeRay calls a job whose command failed Failed too, and the rule that is due first is followed.
    assert not [each for each in conditions if each.get("jobStatus") == "FAILED"]
    [failed] = [each["ttlSeconds"] for each in conditions if each.get("jobDeploymentStatus") == "Failed"]
    assert failed >= 3600
    environment = yaml.safe_load(job["runtimeEnvYAML"])
    assert environment["env_vars"] == document("runtime_env.yaml")["env_vars"]


def test_everything_waits_longer_than_trials_may_take_to_leave() -> None:
    groups = ray_groups(document("kuberay/raycluster.yaml")["spec"])
    for name, group in groups.items():
        pod = group["template"]["spec"]
        *command, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == (["python", "/opt/memray/infra/leave_node.py"] if name == "gpu" else ["sleep"])
        # The script may take a quarter of the time to tell Ray, before it begins to wait for the trials.
        *_, waited = groups["gpu"]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert float(waited) >= GRACE_S
        assert float(seconds) >= float(waited) * (1 if name == "gpu" else 1.25)
        assert float(waited) * 1.25 < pod["terminationGracePeriodSeconds"] > float(seconds)
        stop = {each["name"]: each.get("value") for each in pod["containers"][0]["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
        assert float(stop) > GRACE_S
    [stop] = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (INFRA / "ray-cluster.yaml").read_text())
    assert float(stop) > GRACE_S
    assert f'leave_node.py" {GRACE_S:.0f}' in (INFRA / "leave_on_spot_notice.sh").read_text()


# --- Secrets and ports ----------------------------------------------------------------------------


def check_no_secret(value: Any) -> None:
    """Every variable with a secret's name is taken from the environment, a file or a Secret.

    Texts within a document are searched too: options for Docker, and YAML in YAML.
    """
    for each in walk(value):
        if SECRET.search(str(each.get("name", ""))) and {"value", "valueFrom"} & set(each):
            assert set(each.get("valueFrom", {})) == {"secretKeyRef"}, each["name"]
        for name, found in each.items():
            if SECRET.search(str(name)):
                assert re.fullmatch(r"\$\{[A-Z_0-9]+:\?.+\}", str(found)), f"{name} must be refused where it is unset"
    for text in texts_of(value):
        check_no_secret_in(text)


def check_no_secret_in(text: str) -> None:
    assert not [name for name in GIVEN.findall(text) if SECRET.search(name)], text


@pytest.mark.parametrize("file", [*MANIFESTS, *COMPOSE_FILES, "ray-cluster.yaml", "runtime_env.yaml"])
def test_no_document_holds_a_secret(file: str) -> None:
    for each in documents(file):
        check_no_secret(each)
        assert each.get("kind") != "Secret"


def test_a_planted_secret_is_refused() -> None:
    container = ("spec", *POD, "containers", 0, "env", 3)
    refused_after(
        put({"name": "PGPASSWORD", "value": "x"}, *container), document("tracking/kubernetes.yaml"), check_no_secret
    )
    compose = ("services", "postgres", "environment", "POSTGRES_PASSWORD")
    for planted in ("hunter2", "${POSTGRES_PASSWORD:-hunter2}", "${POSTGRES_PASSWORD}"):
        refused_after(put(planted, *compose), document("tracking/compose.yaml"), check_no_secret)
    for planted in (["POSTGRES_PASSWORD=hunter2"], {"POSTGRES_PASSWORD": 1234}):
        refused_after(put(planted, *compose[:-1]), document("tracking/compose.yaml"), check_no_secret)
    option = "-e MLFLOW_TRACKING_PASSWORD=hunter2"
    refused_after(put(option, "docker", "run_options", 2), document("ray-cluster.yaml"), check_no_secret)
    variables: dict[str, Any] = {"env_vars": {"MLFLOW_TRACKING_PASSWORD": "hunter2"}}
    refused_after(put("hunter2", "env_vars", "MLFLOW_TRACKING_PASSWORD"), document("runtime_env.yaml"), check_no_secret)
    for planted in (yaml.safe_dump(variables), json.dumps(variables)):
        refused_after(put(planted, "spec", "runtimeEnvYAML"), document("kuberay/rayjob.yaml"), check_no_secret)


def test_no_file_holds_a_password_in_an_address_or_a_long_random_text() -> None:
    suspicious = re.compile(r"://[^/\s$]+:[^/\s@$]+@|\b[0-9a-f]{32,}\b|\bAKIA[0-9A-Z]{16}\b|\bhf_\w{20,}")
    assert suspicious.search("postgresql://mlflow:hunter2@db/mlflow")
    for path, text in texts():
        assert not suspicious.search(text), path
        check_no_secret_in(text)
    assert not re.search(r"(?m)^\s*admin_password", (INFRA / "tracking/basic_auth.ini").read_text())


def test_compose_publishes_on_loopback_alone() -> None:
    for file in COMPOSE_FILES:
        for name, service in document(file)["services"].items():
            assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
            if service.get("network_mode") == "host":
                said = [*service.get("command", []), *service.get("environment", {}).values()]
                assert any("127.0.0.1" in each for each in said), f"{name} must listen on loopback"


def check_stores_are_kept_from_the_host(compose: dict[str, Any]) -> None:
    """What publishes nothing is on networks alone on which the host has no address."""
    for name, service in compose["services"].items():
        if "ports" not in service:
            assert service.get("networks"), f"{name} is on the default network"
            for network in (compose["networks"].get(each, {}) for each in service["networks"]):
                assert network.get("internal") is True
                assert network.get("enable_ipv6") is False
                assert network["driver_opts"] == {"com.docker.network.bridge.gateway_mode_ipv4": "isolated"}


def test_users_of_its_machine_cannot_reach_what_compose_does_not_publish() -> None:
    for change in (
        put(False, "networks", "stores", "internal"),
        put("nat", "networks", "stores", "driver_opts", "com.docker.network.bridge.gateway_mode_ipv4"),
        put(True, "networks", "stores", "enable_ipv6"),
        put(["default", "stores"], "services", "s3", "networks"),
        misspell("services", "s3", "networks"),
    ):
        refused_after(change, document("tracking/compose.yaml"), check_stores_are_kept_from_the_host)


def test_mlflow_listens_on_loopback_except_in_its_container() -> None:
    assert re.findall(r"--host (\S+)", (INFRA / "tracking/serve.sh").read_text()) == ['"${HOST:-127.0.0.1}"']
    assert ("ENV", "HOST=0.0.0.0") in instructions("tracking/Dockerfile")


def test_kubernetes_publishes_nothing_outside_the_cluster() -> None:
    assert {each["spec"].get("type", "ClusterIP") for each in of_kind("Service")} == {"ClusterIP"}
    for file in MANIFESTS:
        for each in walk(documents(file)):
            assert not {"hostPort", "hostNetwork", "nodePort", "externalIPs", "serviceType"} & set(each)
            assert each.get("privileged") is not True
    guarded = [each["spec"]["podSelector"] for each in of_kind("NetworkPolicy")]
    for apps in ("postgres", "mlflow", "s3", "app.kubernetes.io/part-of"):
        assert apps in json.dumps(guarded)


def test_whoever_talks_to_ray_shows_the_token() -> None:
    for spec in (
        document("kuberay/raycluster.yaml")["spec"],
        document("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    ):
        assert spec["authOptions"] == {"mode": "token", "secretName": "memray-secrets"}
    config = document("ray-cluster.yaml")
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "-e RAY_AUTH_TOKEN_PATH=/run/memray/auth_token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/run/memray/auth_token"] == "~/.ray/auth_token"
    [head] = [each for each in config["head_start_ray_commands"] if "--head" in each]
    assert "--dashboard-host=127.0.0.1" in head


# --- Versions -------------------------------------------------------------------------------------


def images() -> Iterator[tuple[str, str]]:
    for path, text in texts():
        if path.name == "Dockerfile":
            yield from (
                (str(path), found)
                for found in re.findall(r"(?m)^FROM (\S+)|--from=(\S+)", text)
                for found in found
                if found
            )
        elif path.suffix == ".yaml":
            for each in walk(documents(str(path))):
                if isinstance(each.get("image"), str):
                    yield str(path), each["image"]


def test_every_image_is_pinned_by_a_full_version() -> None:
    found = list(images())
    assert len(found) > 10
    for path, image in found:
        name, _, tag = image.rpartition(":")
        assert name, f"{path}: {image} has no tag"
        assert re.match(r"v?\d+\.\d+", tag), f"{path}: {image} is not pinned by a version"
        version = {"memray": PINNED["ray"], "memray-tracking": PINNED["mlflow"]}.get(name.rpartition("/")[2])
        assert version in (None, tag), f"{path}: {image} must have the version of constraints.txt, {version}"


def test_manifests_and_guide_name_the_pinned_versions() -> None:
    for spec in (
        document("kuberay/raycluster.yaml")["spec"],
        document("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"],
    ):
        assert spec["rayVersion"] == PINNED["ray"] == ray.__version__
    for path, text in texts():
        for name, version in (("memray", PINNED["ray"]), ("memray-tracking", PINNED["mlflow"])):
            assert set(re.findall(rf"REGISTRY/{name}:(\S+)", text)) <= {version}, path


# --- Images ---------------------------------------------------------------------------------------


def instructions(file: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what they are given."""
    text = re.sub(r"(?m)^#.*\n", "", (INFRA / file).read_text()).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_image_is_built_by_the_commands_that_are_tested_and_runs_as_nobody_special() -> None:
    found = instructions("Dockerfile")
    base = found[0][1]
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d-devel-ubuntu24\.04", base)  # nvcc for what torch 2.13 is built with
    runs = [rest for name, rest in found if name == "RUN"]
    assert any("g++" in each and "ninja-build" in each for each in runs)
    assert runs[-2] == "sh /opt/memray/infra/install.sh"
    assert "torch.version.cuda" in runs[-1]
    assert not any("pip install" in each for each in runs)
    for file in ("Dockerfile", "tracking/Dockerfile"):
        users = [rest for name, rest in instructions(file) if name == "USER"]
        assert users == ["1000"], "Kubernetes checks a number, and `ray up` runs as the first user of its machines"
        for name, rest in instructions(file):
            if name == "COPY" and "--from" not in rest:
                assert all((ROOT / source).exists() for source in rest.split()[:-1]), rest


def test_what_is_installed_removes_the_profiler_and_proves_that_it_is_gone() -> None:
    lines = (INFRA / "install.sh").read_text().splitlines()
    installs = [number for number, line in enumerate(lines) if "pip install" in line]
    assert all('-c "$infra/constraints.txt"' in lines[number] for number in installs)
    [removal] = [number for number, line in enumerate(lines) if "pip uninstall" in line and line.endswith(" memray")]
    [proof] = [number for number, line in enumerate(lines) if line.startswith("assert found == (None, None)")]
    assert max(installs) < removal < proof


# --- The dashboard --------------------------------------------------------------------------------


def ray_metrics() -> set[str]:
    """What Ray exports: the gauges of its nodes, and what its own dashboards draw."""
    folder = Path(ray.__path__[0]) / "dashboard/modules/metrics/dashboards"
    drawn = " ".join(path.read_text() for path in folder.glob("*_panels.py"))
    return {f"ray_{name}" for name in METRICS_GAUGES} | set(re.findall(r"\bray_[a-z_]+", drawn))


def check_dashboard(dashboard: dict[str, Any]) -> None:
    ours = {f"ray_{name}" for name in (metrics.TRIALS, metrics.BEHIND, metrics.IN_FLIGHT)}
    asked = {found for each in walk(dashboard) for found in re.findall(r"\bray_[a-z_]+", str(each.get("expr", "")))}
    assert asked <= ours | ray_metrics(), asked - ours - ray_metrics()
    assert ours <= asked


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((INFRA / "monitoring/dashboard.json").read_text())
    refused_after(put("ray_node_gpu_utilisation", "panels", 3, "targets", 0, "expr"), dashboard, check_dashboard)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24

"""The image and the manifests agree with the server and with each other."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest

from dinov3_server.config.load import CONFIG_ENV, load
from dinov3_server.config.settings import SETTINGS, Settings
from dinov3_server.config.types import size
from dinov3_server.processes import supervisor
from tests.deploy.files import DEPLOY, ROOT, compose, dockerfile, dockerfile_env, kubernetes

DEPLOYMENT = kubernetes("Deployment")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
(PREPARE,) = POD["initContainers"]
SERVER = compose()["services"]["server"]
GPU_IN_KUBERNETES, GPU_IN_COMPOSE = "nvidia.com/gpu", "deploy:| +resources:| +reservations:| +devices:"
TOKEN_IN_COMPOSE = "DINOV3_TOKEN_FILE|secrets|  dinov3_token"


def settings_of(environment: dict[str, str]) -> Settings:
    """Return the settings as the server in the image reads them, without its files, which are mounted only there."""
    ours = {name: value for name, value in dockerfile_env().items() if name.startswith("DINOV3_")} | environment
    here = {name: __file__ for name in ours if name.endswith("_FILE")}
    return load({}, ours | here)[0]


def kubernetes_environment() -> dict[str, str]:
    shared = {"name": kubernetes("ConfigMap")["metadata"]["name"]}
    assert CONTAINER["envFrom"] == [{"configMapRef": shared}]
    return kubernetes("ConfigMap")["data"] | {each["name"]: each["value"] for each in CONTAINER["env"]}


def kubernetes_settings() -> Settings:
    return settings_of(kubernetes_environment())


def compose_settings(service: dict[str, Any], **shell: str) -> Settings:
    def filled_in(text: str) -> str:
        return re.sub(r"\$\{(\w+):-(.*?)\}", lambda match: shell.get(match[1], match[2]), text)

    return settings_of({name: filled_in(value) for name, value in service["environment"].items()})


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s", text)[1])  # type: ignore[index]


# --- settings ----------------------------------------------------------------------------------------------------


def test_environments_are_settings() -> None:
    assert settings_of({}).host == "0.0.0.0"
    assert kubernetes_settings().weights == "auto"
    assert compose_settings(SERVER).weights == "auto"
    assert compose_settings(SERVER).cache_dir == kubernetes_settings().cache_dir == dockerfile_env()["DINOV3_CACHE_DIR"]
    assert compose_settings(SERVER, DINOV3_MODEL="vitb16", DINOV3_WEIGHTS="b.pth").weights == "b.pth"


def test_grace_periods_are_longer_than_the_drain() -> None:
    drain = kubernetes_settings().drain_seconds + supervisor.DRAIN_SLACK
    assert drain < POD["terminationGracePeriodSeconds"]
    assert compose_settings(SERVER).drain_seconds + supervisor.DRAIN_SLACK < seconds(SERVER["stop_grace_period"])


def test_memory_limit_holds_arenas_and_processes() -> None:
    settings = kubernetes_settings()
    limit = size(1, 2**50).parse(CONTAINER["resources"]["limits"]["memory"] + "B")
    assert settings.frontends, "the automatic choice depends on the node"
    # The formula of docs/deployment.md, Memory, with 1 GiB for the worker.
    frontend = settings.arena_bytes + settings.frontend_bytes + 2 * settings.max_message_bytes + (192 << 20)
    assert settings.frontends * frontend + (64 << 20) + 2**30 <= limit


# --- the image ---------------------------------------------------------------------------------------------------


def test_image_starts_the_server_as_pid_1_and_not_as_root() -> None:
    instructions = dict(dockerfile())
    (program,) = json.loads(instructions["ENTRYPOINT"])  # Exec form is JSON; a shell would eat SIGTERM.
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(instructions["CMD"]) == CONTAINER["args"] == SERVER["command"] == ["serve"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", instructions["USER"])
    uid, gid = instructions["USER"].split(":")
    assert [uid, gid, gid] == [str(POD["securityContext"][key]) for key in ("runAsUser", "runAsGroup", "fsGroup")]
    assert f"uid {uid}" in (DEPLOY / "compose.yaml").read_text()


def test_image_copies_the_packages_and_nothing_else() -> None:
    copied = {
        path for name, rest in dockerfile() if name == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    }
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = built["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} | {built["project"]["readme"]} <= copied


def test_healthcheck_uses_an_endpoint_of_the_server() -> None:
    (check,) = (rest for name, rest in dockerfile() if name == "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "'DINOV3_HTTP_PORT', 8080" in command[2]
    assert "'/readyz'" in command[2]


# --- addresses ---------------------------------------------------------------------------------------------------


def test_ports_are_the_servers() -> None:
    settings = Settings()
    ports = {"grpc": settings.port, "http": settings.http_port}
    service = kubernetes("Service")["spec"]
    assert {each["name"]: each["containerPort"] for each in CONTAINER["ports"]} == ports
    assert {each["targetPort"]: each["port"] for each in service["ports"]} == ports
    assert {int(port.split(":")[-1]) for port in SERVER["ports"]} == set(ports.values())
    assert dict(dockerfile())["EXPOSE"].split() == [str(port) for port in ports.values()]
    annotations = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(settings.http_port)


def test_compose_publishes_to_this_machine_only() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_probes() -> None:
    assert CONTAINER["startupProbe"]["grpc"] == CONTAINER["readinessProbe"]["grpc"] == {"port": Settings().port}
    assert CONTAINER["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_service_is_headless_and_finds_the_pods() -> None:
    service = kubernetes("Service")["spec"]
    assert service["clusterIP"] == "None"
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert service["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert kubernetes_settings().max_connection_age_seconds > 0


# --- files and rights --------------------------------------------------------------------------------------------


def test_files_that_settings_name_are_mounted() -> None:
    mounts = {each["name"]: each for each in CONTAINER["volumeMounts"]}
    assert set(mounts) == {each["name"] for each in POD["volumes"]}
    assert mounts["token"]["readOnly"]
    assert kubernetes_environment()["DINOV3_TOKEN_FILE"].startswith(mounts["token"]["mountPath"] + "/")
    assert mounts["cache"]["mountPath"] == dockerfile_env()["DINOV3_CACHE_DIR"]
    assert SERVER["volumes"] == [
        f"cache:{dockerfile_env()['DINOV3_CACHE_DIR']}",
        f"${{WEIGHTS_DIR:-./weights}}:{dict(dockerfile())['WORKDIR']}:ro",
    ]
    assert "cache" in compose()["volumes"]

    (volume,) = (each for each in POD["volumes"] if each["name"] == "cache")
    claim = kubernetes("PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim


def test_the_init_container_fetches_what_the_server_then_finds() -> None:
    assert PREPARE["args"] == ["prepare"]
    assert PREPARE["image"] == CONTAINER["image"]
    assert PREPARE["envFrom"][0] == CONTAINER["envFrom"][0]
    assert PREPARE["volumeMounts"] == [each for each in CONTAINER["volumeMounts"] if each["name"] == "cache"]
    assert kubernetes_settings().offline
    # Only the init container has the secret for the download.
    assert [each["secretRef"]["optional"] for each in PREPARE["envFrom"] if "secretRef" in each] == [True]


def test_containers_have_no_rights_that_they_do_not_need() -> None:
    assert POD["securityContext"]["runAsNonRoot"]
    assert POD["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert POD["automountServiceAccountToken"] is False
    assert (
        PREPARE["securityContext"]
        == CONTAINER["securityContext"]
        == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    )
    assert (SERVER["read_only"], SERVER["cap_drop"]) == (True, ["ALL"])
    assert SERVER["security_opt"] == ["no-new-privileges:true"]


# --- lines that are commented out work too ----------------------------------------------------------------


def test_gpu_of_kubernetes() -> None:
    pod = kubernetes("Deployment", uncomment=GPU_IN_KUBERNETES)["spec"]["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits == {**CONTAINER["resources"]["limits"], "nvidia.com/gpu": "1"}


def test_gpu_of_compose() -> None:
    server = compose(uncomment=GPU_IN_COMPOSE)["services"]["server"]
    assert server.pop("deploy") == {
        "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}
    }
    assert server == SERVER


def test_token_of_compose() -> None:
    whole = compose(uncomment=TOKEN_IN_COMPOSE)
    server = whole["services"]["server"]
    (secret,) = server["secrets"]
    assert compose_settings(server).token_file
    assert server["environment"]["DINOV3_TOKEN_FILE"] == f"/run/secrets/{secret}"
    assert set(whole["secrets"]) == {secret}


# --- variables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", "deploy/kubernetes.yaml", "deploy/compose.yaml", "docs/deployment.md"])
def test_variables_in_the_texts_exist(name: str) -> None:
    known = {setting.env for setting in SETTINGS} | {CONFIG_ENV, "DINOV3_TARGET", "DINOV3_TOKEN"}
    assert set(re.findall(r"\bDINOV3_[A-Z_]*[A-Z]\b", (ROOT / name).read_text())) <= known

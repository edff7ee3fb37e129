"""The image and Compose agree with the server, and the image with Kubernetes."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest

import dinov3_server
from dinov3_server.config.load import CONFIG_ENV
from dinov3_server.config.settings import SETTINGS, Settings
from dinov3_server.processes import supervisor
from tests.deploy.files import DEPLOY, ROOT, compose, dockerfile, dockerfile_env, kubernetes, settings_of

POD = kubernetes("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SERVER = compose()["services"]["server"]
GPU_IN_COMPOSE = "deploy:| +resources:| +reservations:| +devices:"
TOKEN_IN_COMPOSE = "DINOV3_TOKEN_FILE|secrets|  dinov3_token"


def compose_settings(service: dict[str, Any], **shell: str) -> Settings:
    def filled_in(text: str) -> str:
        return re.sub(r"\$\{(\w+):-(.*?)\}", lambda match: shell.get(match[1], match[2]), text)

    return settings_of({name: filled_in(value) for name, value in service["environment"].items()})


def seconds(text: str) -> float:
    return float(re.fullmatch(r"(\d+)s", text)[1])  # type: ignore[index]


# --- settings ----------------------------------------------------------------------------------------------------


def test_environments_are_settings() -> None:
    assert settings_of({}).host == "0.0.0.0"
    assert compose_settings(SERVER).weights == "auto"
    assert compose_settings(SERVER).cache_dir == dockerfile_env()["DINOV3_CACHE_DIR"]
    assert compose_settings(SERVER, DINOV3_MODEL="vitb16", DINOV3_WEIGHTS="b.pth").weights == "b.pth"


def test_the_grace_period_is_longer_than_the_drain() -> None:
    assert compose_settings(SERVER).drain_seconds + supervisor.DRAIN_SLACK < seconds(SERVER["stop_grace_period"])


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
    paths = [
        path for name, rest in dockerfile() if name == "COPY" and "--from" not in rest for path in rest.split()[:-1]
    ]
    locks = {path for path in paths if path.startswith("constraints/image/")}
    copied = set(paths) - locks
    (variant,) = (path for path in locks if "$" in path)
    assert all((ROOT / variant.replace("${TORCH}", torch)).exists() for torch in ("cpu", "cuda"))
    assert all((ROOT / path).exists() for path in locks - {variant})
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in ignore if not line.startswith("#")]
    assert patterns[0] == "*"
    assert {line[1:] for line in patterns if line.startswith("!")} == copied | {"constraints/image"}
    assert all((ROOT / path).exists() for path in copied)

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = built["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} | {built["project"]["readme"]} <= copied


def test_image_and_overlays_have_the_version_of_the_server() -> None:
    (version,) = (rest for name, rest in dockerfile() if name == "ARG" and rest.startswith("VERSION="))
    assert version == f"VERSION={dinov3_server.__version__}"
    for overlay in (DEPLOY / "kubernetes/overlays").glob("*/kustomization.yaml"):
        tags = re.findall(r"newTag: ([\d.]+)", overlay.read_text())
        assert set(tags) <= {dinov3_server.__version__}


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
    assert {int(port.split(":")[-1]) for port in SERVER["ports"]} == set(ports.values())
    assert dict(dockerfile())["EXPOSE"].split() == [str(port) for port in ports.values()]


def test_compose_publishes_to_this_machine_only() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


# --- files and rights --------------------------------------------------------------------------------------------


def test_volumes_of_compose_cover_the_folders_of_the_image() -> None:
    assert SERVER["volumes"] == [
        f"cache:{dockerfile_env()['DINOV3_CACHE_DIR']}",
        f"${{WEIGHTS_DIR:-./weights}}:{dict(dockerfile())['WORKDIR']}:ro",
    ]
    assert "cache" in compose()["volumes"]


def test_compose_gives_no_rights_that_are_not_needed() -> None:
    assert (SERVER["read_only"], SERVER["cap_drop"]) == (True, ["ALL"])
    assert SERVER["security_opt"] == ["no-new-privileges:true"]


# --- lines that are commented out work too ----------------------------------------------------------------


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


MANIFESTS = [str(path.relative_to(ROOT)) for path in sorted((DEPLOY / "kubernetes").rglob("*.yaml"))]


@pytest.mark.parametrize("name", ["Dockerfile", *MANIFESTS, "deploy/compose.yaml", "docs/deployment.md"])
def test_variables_in_the_texts_exist(name: str) -> None:
    known = {setting.env for setting in SETTINGS} | {CONFIG_ENV, "DINOV3_TARGET", "DINOV3_TOKEN"}
    assert set(re.findall(r"\bDINOV3_[A-Z_]*[A-Z]\b", (ROOT / name).read_text())) <= known

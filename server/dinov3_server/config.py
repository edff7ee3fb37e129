"""Every setting of the server, declared once, and where its value comes from.

A setting `max_batch_images` is the flag `--max-batch-images`, the environment variable
`DINOV3_MAX_BATCH_IMAGES` and the YAML key `max_batch_images`. A flag wins over the environment, the
environment over the YAML file (`--config FILE` or `DINOV3_CONFIG`), the file over the default.

All three sources give text (a YAML list is its items joined by commas), so a value means the same
wherever it was written.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from dinov3_server.config_kinds import (
    BOOLEAN,
    COMMIT,
    DEVICES,
    FILE,
    IMAGE_SIZES,
    PORT,
    SOURCE,
    TEXT,
    Kind,
    choice,
    integer,
    seconds,
    size,
)
from dinov3_server.errors import ConfigError

ENV_PREFIX = "DINOV3_"
CONFIG_ENV = "DINOV3_CONFIG"
# Variables of this prefix that are no settings: what names the YAML file, and what others of the project read.
_OTHER_ENV = frozenset({CONFIG_ENV, "DINOV3_TARGET", "DINOV3_TOKEN", "DINOV3_UPSTREAM"})
# What Kubernetes puts into every pod beside a Service that is called "dinov3" or "dinov3-...".
_SERVICE_LINK = re.compile(r"DINOV3_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")

_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{tag}" for tag in ("str", "int", "float", "bool", "timestamp"))
_NULL = "tag:yaml.org,2002:null"
_LISTED = "`dinov3-server config` lists them"

_ADDRESS = TEXT._replace(metavar="ADDRESS")

T = TypeVar("T")


class Declared(NamedTuple):
    """One setting: its field of `Settings`, and its three names."""

    name: str
    default: Any
    kind: Kind
    topic: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def show(self, value: Any) -> str:
        """`value` as a person would write it; empty where the setting is not set."""
        return "" if value in (None, "") else self.kind.show(value)


def _setting(default: T, kind: Kind, topic: str, help: str) -> T:
    return field(default=default, metadata={"kind": kind, "topic": topic, "help": help})


@dataclass(frozen=True)
class Settings:
    """The effective settings. Times are seconds, sizes bytes. Raises ConfigError where two contradict each other."""

    host: str = _setting(
        "127.0.0.1",
        _ADDRESS,
        "network",
        "Address that gRPC listens on. The default is reachable from this machine only; 0.0.0.0 is every IPv4 "
        "interface. Think of TLS and a token first.",
    )
    port: int = _setting(50051, PORT, "network", "Port of gRPC; 0 takes a free one.")
    http_host: str = _setting(
        "",
        _ADDRESS,
        "network",
        "Address of /metrics, /healthz and /readyz, which ask for no credentials; as host if unset.",
    )
    http_port: int = _setting(8080, PORT, "network", "Port of /metrics, /healthz and /readyz; 0 takes a free one.")
    max_connection_age_seconds: float = _setting(
        0.0,
        seconds(0, 86400),
        "network",
        "Connections older than this are asked to reconnect, so that they spread anew over frontends and replicas; "
        "calls in flight finish. 0: never.",
    )

    model: str = _setting(
        "vits16", TEXT._replace(metavar="NAME"), "model", "Variant to serve; `dinov3-server models` lists them."
    )
    weights: str = _setting(
        "auto",
        SOURCE._replace(metavar="auto|FILE|URL|hf://OWNER/REPO[@REVISION]|random:SEED"),
        "model",
        "Where the weights come from. auto: a verified file under home, else weights_url, else Hugging Face. Or a file "
        "or folder, an https:// or file:// URL, a repository of Hugging Face, or random:SEED for features without "
        "meaning.",
    )
    dataset: str | None = _setting(
        None,
        choice("lvd1689m", "sat493m"),
        "model",
        "What the weights were trained on, which sets the mean and std of their input. Unset: as the name of the file "
        "or repository says, else lvd1689m.",
    )
    backbone: str = _setting(
        "ours",
        choice("ours", "upstream"),
        "model",
        "Whose code computes: ours (the fast one), or upstream, Meta's own modules.",
    )
    dtype: str = _setting(
        "auto",
        choice("auto", "float32", "bfloat16"),
        "model",
        "What the model computes in; auto: bfloat16 where the device has it, else float32.",
    )
    devices: tuple[str, ...] = _setting(
        ("auto",),
        DEVICES,
        "model",
        "One worker process each; auto: every CUDA device, or the CPU where there is none.",
    )
    warm_up_sizes: tuple[tuple[int, int], ...] = _setting(
        ((256, 256), (224, 224)),
        IMAGE_SIZES,
        "model",
        "Input sizes that run once before the server is ready, so that no request pays for first use.",
    )

    home: str = _setting(
        "~/.cache/dinov3-serving",
        TEXT._replace(metavar="FOLDER"),
        "provisioning",
        "Where weights, Meta's code and certificates are kept. Several servers may share it.",
    )
    offline: bool = _setting(
        False,
        BOOLEAN,
        "provisioning",
        "Never open a connection to fetch anything: use what is there, or say what is not.",
    )
    weights_url: str | None = _setting(
        None,
        SOURCE._replace(metavar="URL"),
        "provisioning",
        "Where `weights: auto` fetches the official file: the signed URL that Meta sends by e-mail, or a mirror's.",
    )
    verify: str = _setting(
        "manifest",
        choice("manifest", "full"),
        "provisioning",
        "How weights under home are checked at start: against size and time in their manifest, or hashed in full.",
    )
    repo_url: str = _setting(
        "https://github.com/facebookresearch/dinov3.git",
        SOURCE._replace(metavar="URL"),
        "provisioning",
        "Git repository of Meta's code: theirs, a mirror, or a local path.",
    )
    revision: str = _setting(
        "6876159a11b4df116f30f667f8c9888617df0751",
        COMMIT,
        "provisioning",
        "Commit of Meta's code that is used.",
    )
    target_dir: str | None = _setting(
        None,
        TEXT._replace(metavar="FOLDER"),
        "provisioning",
        "Checkout of Meta's code. Unset: a folder under home, named after the revision.",
    )
    certificate: bool = _setting(
        True,
        BOOLEAN,
        "provisioning",
        "Compare the served features with those of Meta's code before the server is ready. It wants that code, and "
        "the memory of one more model for a while.",
    )

    max_batch_images: int = _setting(32, integer(1, 65536), "batching", "Most images in one batch.")
    max_batch_tokens: int = _setting(
        16384,
        integer(1, 2**31 - 1),
        "batching",
        "Most tokens (CLS, registers and patches of all images) in one batch. An image of more is refused.",
    )
    max_queue_delay: float = _setting(
        0.0,
        seconds(0, 10),
        "batching",
        "How long an idle device waits for a fuller batch. 0: it takes what is there; batches grow while it is busy.",
    )

    max_queue_images: int = _setting(
        1024,
        integer(1, 2**31 - 1),
        "limits",
        "Images a frontend holds at once, waiting or running; more are told to retry.",
    )
    max_images_per_request: int = _setting(512, integer(1, 65536), "limits", "Most images in one request.")
    max_message_bytes: int = _setting(
        2**27, size(2**20, 2**31 - 1), "limits", "Largest gRPC message, in either direction."
    )
    max_image_pixels: int = _setting(
        100_000_000, integer(1, 2**31 - 1), "limits", "Largest decoded image, width times height."
    )
    arena_bytes: int = _setting(
        2**29,
        size(2**20, 2**40),
        "limits",
        "Shared memory of each frontend for pixels and features. It is taken whole at start; when it is full, requests "
        "are told to retry.",
    )
    stream_window: int = _setting(
        32, integer(1, 65536), "limits", "Unanswered requests of one stream after which the server reads no further."
    )

    frontends: int = _setting(
        0,
        integer(0, 256),
        "processes",
        "Processes that speak gRPC and decode images; 0 chooses by the number of CPUs.",
    )
    decode_threads: int = _setting(
        0,
        integer(0, 256),
        "processes",
        "Threads of each frontend that decode and resize; 0 chooses by the number of CPUs.",
    )
    threads: int = _setting(
        0, integer(0, 1024), "processes", "Threads of a CPU worker's model; 0 chooses by the number of CPUs."
    )
    drain_seconds: float = _setting(
        30.0,
        seconds(0, 3600),
        "processes",
        "After SIGTERM, how long requests in flight may still take. Kubernetes' "
        "terminationGracePeriodSeconds must be longer.",
    )
    batch_timeout_seconds: float = _setting(
        120.0, seconds(1, 3600), "processes", "A batch that runs longer means a hung device: its worker is replaced."
    )
    worker_restart_limit: int = _setting(
        5,
        integer(1, 1000),
        "processes",
        "Failed starts of one process in a row after which the server gives up and exits.",
    )

    token_file: str | None = _setting(
        None,
        FILE,
        "security",
        "File whose content is the bearer token that every call must bring; unset: calls need none.",
    )
    tls_cert_file: str | None = _setting(
        None, FILE, "security", "PEM certificate chain of the gRPC port; with tls_key_file."
    )
    tls_key_file: str | None = _setting(None, FILE, "security", "PEM private key of tls_cert_file.")
    tls_client_ca_file: str | None = _setting(
        None, FILE, "security", "PEM authorities; when set, clients must show a certificate that one of them signed."
    )

    log_level: str = _setting(
        "info", choice("debug", "info", "warning", "error"), "logging", "Least severity that is logged."
    )
    log_format: str = _setting("text", choice("text", "json"), "logging", "text for people, json: one object a line.")

    def __post_init__(self) -> None:
        if not self.http_host:
            object.__setattr__(self, "http_host", self.host)
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            given, missing = ("cert", "key") if self.tls_cert_file else ("key", "cert")
            raise ConfigError(f"tls_{given}_file is set and tls_{missing}_file is not: TLS needs both")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ConfigError(
                "tls_client_ca_file is set without tls_cert_file and tls_key_file: it needs TLS on the port"
            )
        if self.port and (self.host, self.port) == (self.http_host, self.http_port):
            raise ConfigError(f"port and http_port are both {self.port}: gRPC and HTTP need a port each")
        if self.max_images_per_request > self.max_queue_images:
            raise ConfigError(
                f"max_images_per_request ({self.max_images_per_request}) is over max_queue_images "
                f"({self.max_queue_images}): the largest requests could never be admitted"
            )
        for name in ("home", "target_dir", "weights"):
            path = getattr(self, name) or ""
            try:
                Path(path).expanduser()
            except RuntimeError:
                declared = _BY_NAME[name]
                raise ConfigError(
                    f"{name} is {declared.show(path)!r} and no such home directory is known; set {declared.flag} "
                    f"({declared.env}) to a full path"
                ) from None

    @property
    def home_folder(self) -> Path:
        return Path(self.home).expanduser()


SETTINGS: tuple[Declared, ...] = tuple(Declared(f.name, f.default, **f.metadata) for f in fields(Settings))
_BY_NAME = {declared.name: declared for declared in SETTINGS}
TOPICS: tuple[str, ...] = tuple(dict.fromkeys(declared.topic for declared in SETTINGS))


class _Given(NamedTuple):
    value: Any
    source: str


def load(flags: Mapping[str, str], environ: Mapping[str, str]) -> tuple[Settings, dict[str, str]]:
    """The effective settings, and of each where it came from. A value that another overrides must be good, too.

    `flags` holds the text of the flags that were given, by setting name, and under `config` that of `--config`.
    A source is "flag --port", "environment DINOV3_PORT", "config.yaml:7" or "default". Raises ConfigError.
    """
    given: dict[str, _Given] = {}
    if "config" in flags:
        given |= _read_yaml(flags["config"], "flag --config")
    elif CONFIG_ENV in environ:
        given |= _read_yaml(environ[CONFIG_ENV], f"environment {CONFIG_ENV}")
    given |= _read_environment(environ)
    given |= {
        name: _parse(_BY_NAME[name], text, f"flag {_BY_NAME[name].flag}")
        for name, text in flags.items()
        if name != "config"
    }

    settings = Settings(**{name: each.value for name, each in given.items()})
    return settings, {name: given[name].source if name in given else "default" for name in _BY_NAME}


def nearest(unknown: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean X?" for a message about an unknown name, or nothing where no known one is near.

    `prefix` is what all of them begin with, and no likeness.
    """
    bare = [name.removeprefix(prefix) for name in known]
    close = difflib.get_close_matches(unknown.removeprefix(prefix), bare, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _parse(declared: Declared, text: str, source: str) -> _Given:
    try:
        return _Given(declared.kind.parse(text), source)
    except ValueError:
        raise ConfigError(f"{declared.name} is {text!r} ({source}); allowed: {declared.kind.allowed}") from None


def _read_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    by_env = {declared.env: declared for declared in SETTINGS}
    given = {}
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_ENV or _is_service_link(variable, text):
            continue
        if variable not in by_env:
            near = nearest(variable, by_env, ENV_PREFIX)
            raise ConfigError(f"environment {variable} is not a setting{near} ({_LISTED})")
        given[by_env[variable].name] = _parse(by_env[variable], text, f"environment {variable}")
    return given


def _is_service_link(variable: str, text: str) -> bool:
    # DINOV3_PORT is a setting; as a service link it is "tcp://10.0.0.1:50051".
    return bool(_SERVICE_LINK.fullmatch(variable)) or (variable.endswith("_PORT") and "://" in text)


def _read_yaml(path: str, source: str) -> dict[str, _Given]:
    try:
        # Composed, not constructed: scalars stay the text they were written as, and know their line.
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {path!r} ({source}): {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} ({source}) is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} ({source}) is not valid YAML: {' '.join(str(error).split())}") from None
    if root is None or root.tag == _NULL:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} ({source}) must be a mapping of settings, as `port: 50051`")

    given: dict[str, _Given] = {}
    for key, value in root.value:
        line = f"{path}:{key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping as a key"
        if name not in _BY_NAME:
            raise ConfigError(f"{line}: {name} is not a setting{nearest(name, _BY_NAME)} ({_LISTED})")
        if name in given:
            raise ConfigError(f"{line}: {name} is given twice, first at {given[name].source}")
        given[name] = _parse(_BY_NAME[name], _yaml_text(value, _BY_NAME[name], line), line)
    return given


def _yaml_text(node: yaml.Node, declared: Declared, line: str) -> str:
    if isinstance(node, yaml.SequenceNode) and declared.kind.many:
        return ",".join(_yaml_scalar(item, declared, line) for item in node.value)
    return _yaml_scalar(node, declared, line)


def _yaml_scalar(node: yaml.Node, declared: Declared, line: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        raise ConfigError(f"{line}: {declared.name} holds {found}; allowed: {declared.kind.allowed}")
    if node.tag == _NULL:
        raise ConfigError(f"{line}: {declared.name} has no value; leave the key out to take the default")
    if node.tag not in _SCALAR_TAGS:
        raise ConfigError(f"{line}: {declared.name} has the YAML tag {node.tag}; a plain value is allowed")
    return str(node.value)

"""Declare every setting of the server once; `load.py` reads their values.

A setting `max_batch_images` is the flag `--max-batch-images`, the environment variable
`DINOV3_MAX_BATCH_IMAGES` and the YAML key `max_batch_images`. A flag wins over the environment, the
environment over the YAML file (`--config FILE` or `DINOV3_CONFIG`), the file over the default.

All three sources give text (the items of a YAML list are joined by commas), so a value means the same
in each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dinov3_server.config.types import (
    BOOLEAN,
    COMMIT,
    DEVICES,
    FILE,
    IMAGE_SIZES,
    PORT,
    PROJECTIONS,
    SOURCE,
    TEXT,
    SettingType,
    choice,
    integer,
    seconds,
    size,
)
from dinov3_server.errors import ConfigError

ENV_PREFIX = "DINOV3_"
# The share of a frontend's queue and arena that bulk requests may hold; the rest is kept for interactive ones.
BULK_FRACTION = 0.75

_ADDRESS = TEXT._replace(metavar="ADDRESS")

T = TypeVar("T")


class Setting(NamedTuple):
    """The declaration of one setting, with its flag and its environment variable."""

    name: str
    default: Any
    type: SettingType
    topic: str
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    def show(self, value: Any) -> str:
        """Return `value` as text, as a user would write it; empty if the setting is not set."""
        return "" if value in (None, "") else self.type.show(value)


class _Topic(NamedTuple):
    """A group of settings; calling it declares one of them."""

    name: str

    def __call__(self, default: T, type: SettingType, help: str) -> T:
        return field(default=default, metadata={"type": type, "topic": self.name, "help": help})


_network = _Topic("network")
_model = _Topic("model")
_provisioning = _Topic("provisioning")
_batching = _Topic("batching")
_limits = _Topic("limits")
_processes = _Topic("processes")
_security = _Topic("security")
_logging = _Topic("logging")


@dataclass(frozen=True)
class Settings:
    """The effective settings. Times are in seconds, sizes in bytes. Raises ConfigError if two contradict each other."""

    host: str = _network(
        "127.0.0.1",
        _ADDRESS,
        "Address that gRPC listens on. The default is reachable from this machine only; 0.0.0.0 is every IPv4 "
        "interface. Set up TLS and a token before you open it.",
    )
    port: int = _network(50051, PORT, "Port of gRPC; 0 takes a free one.")
    http_host: str = _network(
        "", _ADDRESS, "Address of /metrics, /healthz and /readyz, which need no credentials. Unset: the same as host."
    )
    http_port: int = _network(8080, PORT, "Port of /metrics, /healthz and /readyz; 0 takes a free one.")
    max_connection_age_seconds: float = _network(
        0.0,
        seconds(0, 86400),
        "Age at which a connection is asked to reconnect, so that connections spread again over frontends and "
        "replicas; calls in flight finish. 0: never.",
    )

    model: str = _model("vits16", TEXT._replace(metavar="NAME"), "Variant to serve; `dinov3-server models` lists them.")
    weights: str = _model(
        "auto",
        SOURCE._replace(metavar="auto|FILE|URL|hf://OWNER/REPO[@REVISION]|random:SEED"),
        "Source of the weights. auto: a verified file under cache_dir, else weights_url, else Hugging Face. Or a file "
        "or folder, an https:// or file:// URL, a Hugging Face repository, or random:SEED for features without "
        "meaning.",
    )
    dataset: str | None = _model(
        None,
        choice("lvd1689m", "sat493m"),
        "Data set that the weights were trained on; it sets the mean and std of the input. Unset: taken from the name "
        "of the file or repository, else lvd1689m.",
    )
    backbone: str = _model(
        "native",
        choice("native", "reference"),
        "Implementation of the model: native, the fast one, or reference, Meta's own modules.",
    )
    dtype: str = _model(
        "auto",
        choice("auto", "float32", "bfloat16"),
        "Data type that the model computes in. auto: bfloat16 if the device supports it, else float32.",
    )
    devices: tuple[str, ...] = _model(
        ("auto",),
        DEVICES,
        "Devices, with one worker process for each. auto: every CUDA device, or the CPU if there is none.",
    )
    warm_up_sizes: tuple[tuple[int, int], ...] = _model(
        ((256, 256), (224, 224)),
        IMAGE_SIZES,
        "Input sizes that run once before the server is ready, so that no request pays for their first use.",
    )
    projections: tuple[tuple[str, str], ...] = _model(
        (),
        PROJECTIONS,
        "Linear maps that requests can apply to the channels of patches: a name and a file for each. A .npy file "
        "holds a float matrix [K, D], where D is the number of channels of a layer; a .safetensors file holds weight "
        "[K, D] and, optionally, bias [K].",
    )

    cache_dir: str = _provisioning(
        "~/.cache/dinov3-serving",
        TEXT._replace(metavar="FOLDER"),
        "Folder for weights, Meta's code and the results of parity checks. Several servers may share it.",
    )
    offline: bool = _provisioning(
        False,
        BOOLEAN,
        "Never open a connection to fetch anything: use what is in cache_dir, or fail and name what is missing.",
    )
    weights_url: str | None = _provisioning(
        None,
        SOURCE._replace(metavar="URL"),
        "URL from which `weights: auto` fetches the official file: the signed URL in Meta's e-mail, or a mirror's.",
    )
    verify_weights: str = _provisioning(
        "manifest",
        choice("manifest", "full"),
        "How weights under cache_dir are checked at start. manifest: size and time are compared with the file's "
        "manifest; full: every byte is hashed.",
    )
    upstream_repo: str = _provisioning(
        "https://github.com/facebookresearch/dinov3.git",
        SOURCE._replace(metavar="URL"),
        "Git repository of Meta's code: Meta's own, a mirror, or a local path.",
    )
    upstream_revision: str = _provisioning(
        "6876159a11b4df116f30f667f8c9888617df0751", COMMIT, "Commit of Meta's code to use."
    )
    upstream_dir: str | None = _provisioning(
        None,
        TEXT._replace(metavar="FOLDER"),
        "Checkout of Meta's code. Unset: a folder under cache_dir, named after the commit.",
    )
    parity_check: bool = _provisioning(
        True,
        BOOLEAN,
        "Compare the served features with those of Meta's code before the server is ready. This needs Meta's code, "
        "and for a while the memory of one more model.",
    )

    max_batch_images: int = _batching(32, integer(1, 65536), "Most images in one batch.")
    max_batch_tokens: int = _batching(
        16384,
        integer(1, 2**31 - 1),
        "Most tokens (CLS, registers and patches of all images) in one batch. A larger image is refused.",
    )
    max_queue_delay_seconds: float = _batching(
        0.0,
        seconds(0, 10),
        "Time that an idle device waits for a fuller batch. 0: it takes the images that are waiting; batches grow "
        "while it is busy.",
    )

    max_queue_images: int = _limits(
        4096,
        integer(1, 2**31 - 1),
        "Most images that a frontend holds, waiting or running. Further requests are refused with the time to retry.",
    )
    max_wait_seconds: float = _limits(
        60.0,
        seconds(0.1, 86400),
        "Longest expected wait of a request without a deadline; beyond it the request is refused with the time to "
        "retry. A request with a deadline is refused if the expected wait would pass the deadline.",
    )
    max_images_per_request: int = _limits(
        512, integer(1, 65536), "Most images in one request; each view of an image counts as one."
    )
    max_message_bytes: int = _limits(2**27, size(2**20, 2**31 - 1), "Largest gRPC message, in either direction.")
    max_image_pixels: int = _limits(100_000_000, integer(1, 2**31 - 1), "Largest decoded image, width times height.")
    arena_bytes: int = _limits(
        2**29,
        size(2**20, 2**40),
        "Shared memory of each frontend for pixels and features. All of it is allocated at start; while it is full, "
        "requests are refused with the time to retry.",
    )
    frontend_bytes: int = _limits(
        2**30,
        size(2**22, 2**40),
        "Memory of each frontend, beside its arena, for received messages, pictures being decoded and answers not "
        "read yet. While it is full, requests wait for room, and are then refused with the time to retry. Of it, "
        "max_message_bytes are reserved for messages, and as much for answers (each of which counts twice). At least "
        "4 x max_message_bytes.",
    )
    stream_window: int = _limits(
        32, integer(1, 65536), "Unanswered requests of one stream at which the server stops reading from it."
    )

    frontends: int = _processes(
        0, integer(0, 256), "Number of processes that speak gRPC and decode images; 0 chooses by the number of CPUs."
    )
    decode_threads: int = _processes(
        0,
        integer(0, 256),
        "Threads of each frontend that decode and resize, and the most decode processes beside them; 0 chooses by the "
        "number of CPUs.",
    )
    threads: int = _processes(
        0, integer(0, 1024), "Threads of the model in a CPU worker; 0 chooses by the number of CPUs."
    )
    drain_seconds: float = _processes(
        30.0,
        seconds(0, 3600),
        "Time for requests in flight to finish after SIGTERM. Kubernetes' terminationGracePeriodSeconds must be "
        "longer.",
    )
    batch_timeout_seconds: float = _processes(
        120.0, seconds(1, 3600), "Time after which a running batch means a hung device; its worker is replaced."
    )
    worker_restart_limit: int = _processes(
        5,
        integer(1, 1000),
        "Failed starts in a row after which a process counts as failed. When all processes of its kind have failed, "
        "the server exits.",
    )

    token_file: str | None = _security(
        None,
        FILE,
        "File with the bearer token that every call must send, or several tokens, one a line. Unset: calls need no "
        "token. Read again when it changes.",
    )
    tls_cert_file: str | None = _security(
        None, FILE, "PEM certificate chain of the gRPC port; needs tls_key_file. Read again when it changes."
    )
    tls_key_file: str | None = _security(None, FILE, "PEM private key of tls_cert_file. Read again when it changes.")
    tls_client_ca_file: str | None = _security(
        None,
        FILE,
        "PEM certificate authorities. If set, clients must present a certificate that one of them signed. Read again "
        "when it changes.",
    )

    log_level: str = _logging("info", choice("debug", "info", "warning", "error"), "Lowest severity that is logged.")
    log_format: str = _logging("text", choice("text", "json"), "text for people, or json: one object a line.")

    access_log: str | None = _logging(
        None,
        TEXT._replace(metavar="FILE"),
        "File to which a JSON object is appended for each request, or /dev/stderr. Opened again when it was renamed. "
        "Unset: no access log.",
    )

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
        if self.max_images_per_request > BULK_FRACTION * self.max_queue_images:
            raise ConfigError(
                f"max_images_per_request ({self.max_images_per_request}) is over {BULK_FRACTION:.0%} of "
                f"max_queue_images ({self.max_queue_images}), the most that bulk requests "
                "may hold: a bulk request of that size could never be admitted"
            )
        if self.frontend_bytes < 4 * self.max_message_bytes:
            raise ConfigError(
                f"frontend_bytes ({self.frontend_bytes}) is less than 4 x max_message_bytes "
                f"({self.max_message_bytes}): a frontend needs room for a message, its pictures and its answer"
            )
        for name in ("cache_dir", "upstream_dir", "weights"):
            path = getattr(self, name) or ""
            try:
                Path(path).expanduser()
            except RuntimeError:
                setting = BY_NAME[name]
                raise ConfigError(
                    f"{name} is {setting.show(path)!r} and no such home directory is known; set {setting.flag} "
                    f"({setting.env}) to a full path"
                ) from None

    @property
    def cache_folder(self) -> Path:
        return Path(self.cache_dir).expanduser()


SETTINGS: tuple[Setting, ...] = tuple(Setting(f.name, f.default, **f.metadata) for f in fields(Settings))
BY_NAME = {setting.name: setting for setting in SETTINGS}
TOPICS: tuple[str, ...] = tuple(dict.fromkeys(setting.topic for setting in SETTINGS))

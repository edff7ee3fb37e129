"""The supervisor's choices before it starts a process: devices, the number of frontends, and the port they share."""

from __future__ import annotations

import ipaddress
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov3_server.config.settings import Settings
from dinov3_server.errors import StartupError
from dinov3_server.host import available_memory, available_threads

log = logging.getLogger(__name__)

_DRIVER = Path("/dev/nvidiactl")
_COUNT_CUDA = "import torch; print(torch.cuda.device_count())"


def choose_devices(devices: tuple[str, ...]) -> tuple[str, ...]:
    """Return the devices to serve on: the given ones; for auto every CUDA device, or else the CPU."""
    if devices != ("auto",):
        return devices
    # Asking torch takes seconds and a CUDA context, so another process does it, and only if there is a driver.
    if not _DRIVER.exists():
        return ("cpu",)
    answer = subprocess.run([sys.executable, "-c", _COUNT_CUDA], capture_output=True, text=True, check=False)
    count = int(answer.stdout) if answer.stdout.strip().isdigit() else 0
    if not count:
        reason = (answer.stderr.strip().splitlines() or ["torch finds none: is it a build for the CPU?"])[-1]
        log.warning("an NVIDIA driver is installed but no CUDA device can be used (%s); serving on the CPU", reason)
        return ("cpu",)
    return tuple(f"cuda:{i}" for i in range(count))


def choose_frontends(frontends: int, device: str) -> int:
    """Return the number of frontends: the given one; for 0 one beside a CPU worker, else one per four CPUs, at most 8.

    One Python process cannot move the features that a GPU computes; beside a model on the CPU a second frontend would
    only take cores from it.
    """
    if frontends:
        return frontends
    return 1 if device == "cpu" else max(1, min(8, available_threads() // 4))


def check_memory(frontends: int, arena_bytes: int) -> None:
    """Check that the arenas of all frontends fit into memory. Frontends that checked at the same moment would each find
    enough.

    Raises:
        StartupError: they do not fit.
    """
    wanted, available = frontends * arena_bytes, available_memory()
    if wanted > available:
        raise StartupError(
            f"the arenas of {frontends} frontend(s), {arena_bytes} bytes each, take {wanted} bytes of memory and "
            f"{available} are available; set --arena-bytes or --frontends lower or give the server more memory"
        )


def show_address(host: str, port: int) -> str:
    """Return HOST:PORT as a client can use it, with IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def warn_if_open(settings: Settings) -> None:
    """Warn if other machines can reach the gRPC port and it has no TLS or no authentication.

    The host must be an address of this machine.
    """
    host = settings.host
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    if all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found):
        return
    if settings.tls_cert_file is None:
        log.warning(
            "gRPC on %s can be reached from other machines and is NOT ENCRYPTED: the network can read images, "
            "features and tokens; set --tls-cert-file and --tls-key-file",
            host,
        )
    if settings.token_file is None and settings.tls_client_ca_file is None:
        log.warning(
            "gRPC on %s can be reached from other machines and has NO AUTHENTICATION; "
            "set --token-file or --tls-client-ca-file",
            host,
        )


@contextmanager
def hold_port(host: str, port: int) -> Iterator[int]:
    """Reserve the port that all frontends listen on (a free one for 0) until the block ends, and yield it.

    SO_REUSEPORT would silently share the port with another server of this user. So the port is first bound without it,
    which fails if another process listens; then a socket that is bound but does not listen keeps the port reserved
    while every frontend is down.

    Raises:
        StartupError: the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as exclusive:
            # Ignores connections of a previous server in TIME_WAIT; a listener still makes bind fail.
            exclusive.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            exclusive.bind(address)
            exclusive.listen()
            port = exclusive.getsockname()[1]
        holder = socket.socket(family, kind, protocol)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
    except (OSError, UnicodeError) as error:  # UnicodeError: "a..b" is not a host name
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise StartupError(
            f"cannot listen on {show_address(host, port)}: {reason}; "
            "is another server running? --port 0 takes a free port, --host another address"
        ) from None
    with holder:
        yield port

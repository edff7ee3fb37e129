"""Find or fetch everything that a worker needs to load a model: Meta's code and the weights."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from dinov3_server.config.settings import Settings
from dinov3_server.errors import Unreachable
from dinov3_server.families import registry
from dinov3_server.models.interface import Provisioned

log = logging.getLogger(__name__)


def prepare(
    settings: Settings, on_progress: Callable[[str], None] | None = None
) -> tuple[Provisioned, dict[str, float]]:
    """Return the paths that workers need once everything is there, and the seconds that each step took.

    `on_progress` gets a short text now and then. Raises the StartupErrors of `vendor` and `find_or_fetch`; without a
    network, one error lists everything that is missing.
    """
    began = time.monotonic()
    missing: list[Unreachable] = []
    weights = None
    if not needs_a_network(settings.weights):  # a wrong path is named at once
        weights = _weights(settings, on_progress)
    checked = time.monotonic() - began
    # Code next: it is small, and a missing git should be reported before 27 GB of weights are fetched.
    try:
        checkout, absent = _code(settings)
    except Unreachable as error:
        log.warning("Meta's code cannot be fetched; looking for the weights before giving up")
        missing.append(error)
    vendored = time.monotonic()
    try:
        path, label = weights or _weights(settings, on_progress)
    except Unreachable as error:
        missing.insert(0, error)
    if missing:
        at_once = (
            f"Or both at once: on a machine with a network `dinov3-server prepare --model {settings.model} --cache-dir "
            f"FOLDER`, then copy everything in FOLDER into {settings.cache_folder}"
        )
        raise Unreachable("\nAnd ".join(map(str, missing)) + (f"\n{at_once}" if len(missing) > 1 else ""))
    seconds = {"vendor": vendored - began - checked, "weights": checked + time.monotonic() - vendored}
    return Provisioned(path, label, settings.upstream_revision, checkout, absent), seconds


def is_random(weights: str) -> bool:
    return weights.startswith("random:")


def needs_a_network(weights: str) -> bool:
    """Tell whether finding weights may fetch them from another machine."""
    return weights == "auto" or weights.startswith(("https://", "http://", "hf://"))


def checkout_folder(settings: Settings) -> Path:
    """Return the folder for Meta's code."""
    if settings.upstream_dir is not None:
        return Path(settings.upstream_dir).expanduser()
    return settings.cache_folder / "upstream" / settings.upstream_revision


def _weights(settings: Settings, on_progress: Callable[[str], None] | None) -> tuple[str, str]:
    """Return the path of the weights and the name shown to users."""
    if is_random(settings.weights):
        return settings.weights, settings.weights
    from dinov3_server.provision.weights import find_or_fetch

    found = find_or_fetch(settings, registry.lookup(settings.model), on_progress=on_progress)
    return str(found.path), found.label


def _code(settings: Settings) -> tuple[str | None, str]:
    """Return the folder of Meta's verified code, or None and why it is not there."""
    if settings.backbone != "reference":
        if is_random(settings.weights):
            return None, "the weights are random"
        if not settings.parity_check:
            return None, "the setting `parity_check` is false"
    from dinov3_server.provision.vendor import vendor

    target = checkout_folder(settings)
    try:
        vendor(settings.upstream_repo, settings.upstream_revision, target, offline=settings.offline)
    except Unreachable as error:
        # Offline, serve without the parity check. With a network, the cause can be fixed.
        if settings.backbone == "reference":
            raise
        if not settings.offline:
            raise Unreachable(
                f"{error}\nOr serve without the parity check, which needs it: --parity-check false "
                "(DINOV3_PARITY_CHECK=false)"
            ) from None
        log.warning("Meta's code is not there, so the features cannot be verified: %s", error)
        return None, f"Meta's code is not in {target}, and `offline` forbids fetching it"
    return str(target), ""

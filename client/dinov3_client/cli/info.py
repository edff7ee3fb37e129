"""`dinov3-client info`: print the server's model and limits."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dinov3_client._model import Model
from dinov3_client.cli.common import connect, print_line
from dinov3_serving.presets import Preset


def add(commands: Any, server: argparse.ArgumentParser) -> None:
    info = commands.add_parser("info", parents=[server], help="print the server's model and its limits")
    info.set_defaults(command=_info)


def _info(args: argparse.Namespace) -> int:
    with connect(args) as client:
        model = client.model()
    limits = model.limits
    rows = {
        "model": model.name,
        "weights": model.weights + (" (random: the features are meaningless)" if model.random_weights else ""),
        "fingerprint": model.fingerprint,
        "parameters": f"{model.parameters:,}",
        "shape": f"{_each(model.layer_dims)} channels, {model.depth} layers, patch {_each(model.layer_strides)}, "
        f"{model.register_tokens} registers",
        "computes in": f"{model.dtype} on {', '.join(model.devices)}",
        "mean, std": f"{_rounded(model.mean)}, {_rounded(model.std)}",
        "presets": ", ".join(f"{preset.name} {_preset(preset)}" for preset in model.presets),
        "formats": ", ".join(model.image_formats),
        "limits": f"{limits.max_images_per_request} images and {limits.max_message_bytes:,} bytes a request; "
        f"{limits.max_image_pixels:,} pixels and {limits.max_image_tokens:,} tokens an image",
        "parity check": _parity(model),
        "server": f"{model.server_version}, {model.frontends} frontend{'s' if model.frontends != 1 else ''}",
    }
    for name, value in rows.items():
        print_line(f"{name:<12} {value}")
    return 0


def _parity(model: Model) -> str:
    check = model.parity_check
    if not check.verified:
        return f"not verified: {check.reason}"
    cosines = ", ".join(
        f"{proof.output} cosine {proof.least_cosine:.6f}" for proof in check.outputs if proof.dtype == model.dtype
    )
    return f"verified against Meta's code at {check.upstream_revision[:12]}: {cosines} in {model.dtype}"


def _preset(preset: Preset) -> str:
    return f"{preset.size[0]}x{preset.size[1]} {preset.interpolation}" if preset.size else "(pixels as they are)"


def _each(values: Sequence[int]) -> str:
    """Return the values of all layers: 384, or 96/192/384/768 if they differ."""
    return "/".join(map(str, dict.fromkeys(values)))


def _rounded(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)

"""The service under load from several processes: raw pixels and JPEG in, CLS alone and with patches out."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
from PIL import Image

from bench.flood import Flood, flood
from bench.gpu.plan import Config, Plan
from bench.requests import encoded, pixels_request, random_pixels
from bench.server import Server, serving
from dinov3_serving.v1 import feature_service_pb2 as pb

Add = Callable[[dict[str, Any]], None]

PHOTO = (375, 500)  # of the JPEGs, height and width: about ImageNet's average
QUALITY = 90
CONNECTIONS = 8  # of each generator; the kernel spreads them over the frontends randomly
QUEUE = 4096  # more than all generators have in flight, which one frontend may have to hold
STAGES = ("copy_in", "forward", "copy_out")

_together: Barrier | None = None


def service(plan: Plan, add: Add) -> None:
    """Run closed loops from `plan.generators` processes, in place of other machines: they send prepared bytes and parse
    no answer, but share the cores with the server.

    Shares are relative to the wall time: the device's stage times, and the time in which it had a batch.
    """
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(plan.generators)
    with ProcessPoolExecutor(plan.generators, spawn, _meet_at, (together,)) as pool:
        for frontends in plan.frontends:
            with serving(*_flags(plan, frontends)) as server:
                for source in ("raw", "jpeg"):
                    for outputs in ("cls", "cls+patches"):
                        # Single images only with the most frontends: fewer cannot serve them fast enough.
                        for images in (1, 32) if frontends == max(plan.frontends) else (32,):
                            case = {"frontends": frontends, "in": source, "outputs": outputs, "images": images}
                            add(
                                case
                                | _measure(plan, pool, server, request(plan.service, source, outputs, images), images)
                            )


def request(config: Config, source: str, outputs: str, images: int) -> bytes:
    """Return an ExtractRequest with `images` equal images."""
    wanted = pb.Outputs(cls=True, patches=outputs == "cls+patches", dtype=pb.DATA_TYPE_BFLOAT16)
    size = pb.Size(height=config.size, width=config.size)
    if source == "jpeg":
        one = pb.Image(encoded=_jpeg())
        preprocessing = pb.Preprocessing(preset=pb.PRESET_DINOV3, size=size)
        return pb.ExtractRequest(images=[one] * images, preprocessing=preprocessing, outputs=wanted).SerializeToString()
    return pixels_request(random_pixels(images, config.size), wanted)


def _jpeg() -> bytes:
    """Return a JPEG of smooth gradients with noise, which compresses about as well as a photo."""
    height, width = PHOTO
    noise = np.random.default_rng(0)
    coarse = Image.fromarray(noise.integers(0, 256, (height // 25, width // 25, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    pixels = (smooth + noise.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG", quality=QUALITY)


def _flags(plan: Plan, frontends: int) -> list[str]:
    config = plan.service
    flags = {
        "--model": config.model,
        "--weights": "random:0",
        "--dtype": "bfloat16" if plan.device.type == "cuda" else "float32",
        "--devices": str(plan.device),
        "--frontends": str(frontends),
        "--warm-up-sizes": f"{config.size}x{config.size}",
        "--max-queue-images": str(QUEUE),
        "--arena-bytes": plan.arena,
        "--max-batch-images": str(config.batch),
        "--max-batch-tokens": str(config.batch * config.tokens),
    }
    return [part for flag in flags.items() for part in flag]


def _measure(plan: Plan, pool: ProcessPoolExecutor, server: Server, sent: bytes, images: int) -> dict[str, Any]:
    each = max(CONNECTIONS, plan.in_flight // images // plan.generators)
    before, cpu = server.metrics(), server.cpu_seconds()
    running = [
        pool.submit(_generate, server.grpc, sent, each, plan.case_seconds, plan.case_seconds / 4, CONNECTIONS)
        for _ in range(plan.generators)
    ]
    floods = [one.result() for one in running]
    after, cpu_after = server.metrics(), server.cpu_seconds()
    # Snapshots are up to a second old, so their counts are divided by images, not by seconds.
    counted = {name: after[name] - before.get(name, 0.0) for name in after}
    served = counted["dinov3_batch_images_sum",]
    rate = sum(one.requests / one.seconds for one in floods) * images
    device_seconds = {stage: counted["dinov3_stage_seconds_sum", stage] for stage in STAGES}
    device_seconds["busy"] = counted["dinov3_device_busy_seconds_total", str(plan.device)]
    return {
        "images_per_second": round(rate, 1),
        "sent_gb_per_second": round(rate / images * len(sent) / 1e9, 3),
        "received_gb_per_second": round(sum(o.requests / o.seconds * o.answer_nbytes for o in floods) / 1e9, 3),
        "mean_batch": round(served / counted["dinov3_batch_images_count",], 1),
        **{f"{name}_share": round(seconds / served * rate, 4) for name, seconds in device_seconds.items()},
        "cpu_ms_per_image": {role: round((cpu_after[role] - cpu[role]) / served * 1e3, 3) for role in cpu},
        "generators_cpu_cores": round(sum(one.cpu_seconds / one.seconds for one in floods), 2),
    }


def _meet_at(together: Barrier) -> None:
    global _together
    _together = together


def _generate(address: str, sent: bytes, in_flight: int, seconds: float, warm_up: float, connections: int) -> Flood:
    assert _together is not None
    _together.wait(60)  # each process runs one job, and all begin together
    return flood(address, sent, in_flight, seconds, warm_up, connections)

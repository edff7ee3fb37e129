"""A tour of server and client: `make demo`.

Starts `dinov3-server` on free ports, extracts features of scikit-image's photos, prints how requests were batched,
draws the features to demo-out/pca.png, and shuts the server down.

Serves ViT-S/16 with random weights, unless DINOV3_WEIGHTS (and DINOV3_MODEL) are set.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import skimage

from dinov3_client import Client
from dinov3_client.cli import main as client_command

PHOTOS = [
    Path(skimage.__file__).parent / "data" / name
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
]
OUT = Path("demo-out")
CALLERS, CALLS = 16, 48


def main() -> int:
    began = time.monotonic()
    weights = [] if "DINOV3_WEIGHTS" in os.environ else ["--weights", "random:0"]
    command = [sys.executable, "-m", "dinov3_server.cli", "serve", "--port", "0", "--http-port", "0", *weights]
    print("$", "dinov3-server", *command[3:], flush=True)
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        ready = re.fullmatch(r"ready grpc=(\S+) http=(\S+)\n", server.stdout.readline())
        if ready is None:
            print("the server did not start; see its log above", file=sys.stderr)
            return 1
        show(*ready.groups())
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    finally:
        server.kill()
        server.wait()
    print(f"\nthe server drained and exited with {code}; {time.monotonic() - began:.0f} s in all")
    return code


def show(grpc: str, http: str) -> None:
    with Client(grpc) as client:
        model = client.model()
        print(f"\n{model.name} on {', '.join(model.devices)} in {model.dtype}, fingerprint {model.fingerprint}")
        if model.random_weights:
            print(f"*** RANDOM WEIGHTS ({model.weights}): shapes and speed are real, the features are meaningless ***")

        photos = [path.read_bytes() for path in PHOTOS]
        features = client.extract(photos, outputs=("cls", "patches", "registers"), dtype="bfloat16")
        print(f"\n{len(photos)} photos in one request:")
        for name in ("cls", "patches", "registers"):
            values = getattr(features, name)
            print(f"  {name:9} {values.shape!s:14} {values.dtype}, {values.nbytes:,} bytes")
        timings = features.timings
        print(
            f"  decode {timings.decode_seconds * 1e3:.0f} ms, queue {timings.queue_seconds * 1e3:.0f} ms, "
            f"inference {timings.inference_seconds * 1e3:.0f} ms, batch of {timings.batch_images}"
        )

        broken = client.extract([photos[0], b"not an image"], on_error="return")
        print(f"\na broken image fails alone:\n  image 1: {broken.errors[1]}")

        def call(index: int) -> int:
            return client.extract(photos[index % len(photos)], outputs=("cls",), preset="hf").timings.batch_images

        since = time.monotonic()
        with ThreadPoolExecutor(CALLERS) as callers:
            sizes = list(callers.map(call, range(CALLS)))
        seconds = time.monotonic() - since
        print(f"\n{CALLS} requests of one photo from {CALLERS} callers: {CALLS / seconds:.1f} images/s, in batches of")
        print("  " + ", ".join(f"{size} ({count} requests)" for size, count in sorted(Counter(sizes).items())))

    OUT.mkdir(exist_ok=True)
    print()
    client_command(["pca", "--target", grpc, *map(str, PHOTOS), "-o", str(OUT / "pca.png")])

    with urllib.request.urlopen(f"http://{http}/metrics") as page:
        lines = page.read().decode().splitlines()
    print(f"\nfrom http://{http}/metrics (up to a second old):")
    for line in lines:
        if line.startswith(("dinov3_images_total", "dinov3_batch_images_count", "dinov3_model_info")):
            print("  " + line)


if __name__ == "__main__":
    sys.exit(main())

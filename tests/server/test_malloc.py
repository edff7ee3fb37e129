"""Memory freed after a peak is returned to the system."""

from __future__ import annotations

import subprocess
import sys

PEAK = """
from dinov3_server.malloc import keep_freed_memory
from dinov3_server.malloc import Trimmer, allocated_bytes, anonymous_bytes

keep_freed_memory()
before = allocated_bytes()
blocks = [bytearray(b"x") * (1 << 20) for _ in range(256)]
assert allocated_bytes() - before >= 256 << 20
last = bytearray(1)  # above the blocks: the heap cannot simply end earlier
trimmer = Trimmer()
assert trimmer.look(allocated_bytes()) is None  # it is in use
del blocks
assert anonymous_bytes() > 256 << 20
assert trimmer.look(allocated_bytes()) is None  # it was, a moment ago
trimming = Trimmer().look(allocated_bytes())
trimming.join()
assert anonymous_bytes() < 128 << 20, anonymous_bytes()
assert Trimmer().look(allocated_bytes()) is None
trimmer = Trimmer()
trimmer.trim().join()
assert trimmer.trim() is None  # not again at once
"""


def test_memory_freed_after_a_peak_is_returned() -> None:
    subprocess.run([sys.executable, "-c", PEAK], check=True)

"""Use one thread per test process: parallel test processes share the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

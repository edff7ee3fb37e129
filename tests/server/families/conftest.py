"""One thread a test process: the processes of a parallel run share the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)

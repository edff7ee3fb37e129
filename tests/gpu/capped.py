"""A worker with little device memory: TEST_RUNNER=tests.gpu.capped:build, TEST_DEVICE_BYTES beside the model."""

import os
from typing import Any

import torch

from dinov3_server.backbone import runner
from dinov3_server.backbone.runners.base import TorchRunner


def build(*arguments: Any, **options: Any) -> TorchRunner:
    built = runner.build(*arguments, **options)
    torch.cuda.empty_cache()
    memory = built.memory()
    allowed = memory["reserved"] + int(os.environ["TEST_DEVICE_BYTES"])
    torch.cuda.set_per_process_memory_fraction(allowed / memory["total"])
    return built

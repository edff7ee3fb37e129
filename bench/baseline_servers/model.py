"""The model of both baselines: transformers' DINOv3ViTModel, eager, in the same dtype as ours."""

from __future__ import annotations

import os

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DINOv3ViTModel

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


class Model:
    """A model from a folder that `save_pretrained` wrote. A forward pass uses every core."""

    def __init__(self, folder: str, dtype: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = DINOv3ViTModel.from_pretrained(folder, dtype=self._dtype, attn_implementation="sdpa").eval()
        self._first_patch = 1 + self._model.config.num_register_tokens

    def features(self, pixels: NDArray[np.uint8]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLS [N, D] and patches [N, P, D] of RGB images [N, H, W, 3]."""
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        return self.of_normalized((images / 255 - MEAN) / STD)

    def of_normalized(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return CLS and patches of normalized floats [N, 3, H, W]."""
        with torch.inference_mode():
            tokens = self._model(pixels.to(self._dtype)).last_hidden_state
        return tokens[:, 0], tokens[:, self._first_patch :]

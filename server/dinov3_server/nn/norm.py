"""Layer normalization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Norm:
    """Layer normalization over the last axis, in fp32."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

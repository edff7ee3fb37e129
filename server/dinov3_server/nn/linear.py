"""Dense layers, with activation, addition and product fused in where the device supports it.

`Linear` runs anywhere. `PackedLinear` holds its weight in oneDNN's blocked layout, which in fp32 is much faster than
the default BLAS on the CPU of docs/performance.md. Both compute y = x W^T + b, with the exact (erf) GELU.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(eq=False)
class Linear:
    """y = x W^T + b, for x [..., in] and W [out, in]."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def gelu(self, x: Tensor) -> Tensor:
        """Return gelu(y), the exact one."""
        return F.gelu(self(x))

    def silu(self, x: Tensor) -> Tensor:
        """Return silu(y)."""
        return F.silu(self(x))

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        """Return y + other, in the wider of their dtypes."""
        return other + self(x)

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        """Return y * other."""
        return self(x) * other


class PackedLinear(Linear):
    """A Linear by oneDNN primitives, with activation, addition and product computed on the fp32 accumulators."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(torch.ops.mkldnn._reorder_linear_weight(weight), bias)

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, "none")

    def gelu(self, x: Tensor) -> Tensor:
        return self._unary(x, "gelu", "none")

    def silu(self, x: Tensor) -> Tensor:
        return self._unary(x, "swish")

    def add(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "add") if other.dtype == x.dtype else super().add(x, other)

    def mul(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "mul")

    def _unary(self, x: Tensor, name: str, algorithm: str = "") -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y

    def _binary(self, x: Tensor, other: Tensor, name: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, name)
        return y


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Linear:
    """Return the fastest Linear for the device of `weight`, in `dtype` or that of `weight`."""
    weight = weight.to(dtype or weight.dtype).contiguous()
    return (PackedLinear if packs(weight) else Linear)(weight, None if bias is None else bias.to(weight.dtype))


def packs(tensor: Tensor) -> bool:
    """Return whether oneDNN has blocked layouts for the tensor's device and dtype on this machine."""
    return (
        tensor.device.type == "cpu"
        and platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (tensor.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )

"""A small model with the names of Meta's code, for tests without a checkout of that.

`write_checkout` writes a folder with `dinov3/hub/backbones.py`, a copy of this file. The model is written from the
paper (arXiv:2508.10104), independently of the model that it checks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, HIDDEN, REGISTERS, PATCH = 64, 2, 2, 128, 4, 16
SCALE = 1.0  # of the features; any other value is wrong


class Qkv(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, 3 * WIDTH)
        self.register_buffer("bias_mask", torch.full((3 * WIDTH,), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias * self.bias_mask)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = Qkv()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = (self._rotated(t, angles).to(v.dtype) for t in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def _rotated(self, tokens: Tensor, angles: Tensor) -> Tensor:
        prefix = tokens.shape[-2] - angles.shape[0]
        first, second = tokens[..., prefix:, :].float().chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((tokens[..., :prefix, :].float(), turned), dim=-2)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(WIDTH, eps=1e-5), Attention(), Scale()
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(WIDTH, eps=1e-5), Mlp(), Scale()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), angles))
        y: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return y


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, PATCH)


class Rope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("periods", torch.empty(WIDTH // HEADS // 4))

    def forward(self, rows: int, columns: int) -> Tensor:
        """Return the angles, [P, d/2]."""
        y, x = (2 * (torch.arange(count) + 0.5) / count - 1 for count in (rows, columns))
        centres = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        return (2 * math.pi * centres[:, :, None] / self.periods).flatten(1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.storage_tokens = nn.Parameter(torch.empty(1, REGISTERS, WIDTH))
        self.mask_token = nn.Parameter(torch.empty(1, WIDTH))
        self.patch_embed = Embedding()
        self.rope_embed = Rope()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-5)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.norm(self._layers(x)[-1]) * SCALE
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_storage_tokens": tokens[:, 1 : 1 + REGISTERS],
            "x_norm_patchtokens": tokens[:, 1 + REGISTERS :],
        }

    def get_intermediate_layers(
        self, x: Tensor, *, n: list[int], return_class_token: bool, return_extra_tokens: bool, norm: bool
    ) -> tuple[tuple[Tensor, ...], ...]:
        assert return_class_token
        assert return_extra_tokens
        layers = self._layers(x)
        kept = [self.norm(layers[i]) if norm else layers[i] for i in n]
        return tuple((t[:, 1 + REGISTERS :], t[:, 0], t[:, 1 : 1 + REGISTERS]) for t in kept)

    def _layers(self, x: Tensor) -> list[Tensor]:
        assert not self.training
        grid = self.patch_embed.proj(x)
        prefix = torch.cat((self.cls_token, self.storage_tokens), dim=1).expand(len(x), -1, -1)
        x = torch.cat((prefix, grid.flatten(2).transpose(1, 2)), dim=1)
        angles = self.rope_embed(*grid.shape[-2:])
        layers = []
        for block in self.blocks:
            x = block(x, angles)
            layers.append(x)
        return layers


def dinov3_vits16(*, pretrained: bool = True, **_: Any) -> Model:
    assert not pretrained, "the caller loads the weights"
    return Model()


def write_checkout(folder: Path, changes: str = "") -> Path:
    """Write a checkout into `folder` and return it. `changes` is code that runs last when it is imported."""
    hub = folder / "dinov3" / "hub"
    hub.mkdir(parents=True)
    for package in (hub.parent, hub):
        (package / "__init__.py").touch()
    (hub / "backbones.py").write_text(f"{Path(__file__).read_text()}\n\n{changes}\n")
    return folder

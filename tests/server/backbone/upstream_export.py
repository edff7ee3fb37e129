"""Run by test_upstream.py in a separate process: Meta's model with seeded weights, its file and its features.

    python upstream_export.py CHECKOUT NAME DATASET DEPTH OUT [RECIPE]

DEPTH is how many blocks of a ViT are made; a ConvNeXt is always whole. With RECIPE, a ViT is made with the settings of
Meta's default training configuration. Importing upstream changes torch process-wide,
which is why it is not imported by a test. Writes OUT/weights.pth (a plain state dict, as the official files are) and
OUT/features.pth: for each "HxW" the normalized pixels, the normed final tokens by kind, and the tokens of every layer
before the final norm.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def seed_weights(model: torch.nn.Module) -> None:
    """Weights with which a wrong attention, convolution or feed-forward shows; masks and periods stay as upstream
    makes them. Queries and keys shrink with the width, so that no attention is all on one token, where rounding decides
    on which."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
                continue
            parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.mul_(5).add_(1)
            if name.endswith("qkv.weight"):
                width = parameter.shape[1]
                parameter[: 2 * width].mul_(4 * (384 / width) ** 0.5)


# As in Meta's `ssl_default_config.yaml` and `vitl_im1k_lin834.yaml`.
RECIPE = {"n_storage_tokens": 0, "mask_k_bias": False, "norm_layer": "layernorm"}


def make(backbones: Any, name: str, dataset: str, settings: dict[str, Any]) -> Any:
    """Create the model by Meta's entry point, with other settings."""
    construct = backbones._make_dinov3_vit
    backbones._make_dinov3_vit = lambda **published: construct(**published | settings)
    weights = backbones.Weights[dataset.upper()]
    return getattr(backbones, name)(pretrained=False, weights=weights).float().eval()


def layers_of(model: Any, pixels: Tensor) -> list[dict[str, Tensor]]:
    if model.n_storage_tokens:
        vit = model.get_intermediate_layers(
            pixels, n=model.n_blocks, return_class_token=True, return_extra_tokens=True, norm=False
        )
        return [{"patches": p, "cls": c, "registers": r} for p, c, r in vit]
    stages = model.get_intermediate_layers(pixels, n=model.n_blocks, return_class_token=True, norm=False)
    return [{"patches": p, "cls": c} for p, c in stages]


def main(checkout: str, name: str, dataset: str, settings: dict[str, Any], out: Path) -> None:
    sys.path.insert(0, checkout)
    from dinov3.hub import backbones  # type: ignore[import-not-found]

    model = make(backbones, name, dataset, settings)
    seed_weights(model)
    torch.save(model.state_dict(), out / "weights.pth")
    features = {}
    generator = torch.Generator().manual_seed(12)
    for height, width in ((224, 224), (256, 384)):
        pixels = torch.randn(1, 3, height, width, generator=generator)
        with torch.inference_mode():
            tokens = model.forward_features(pixels)
            final = {"cls": tokens["x_norm_clstoken"], "patches": tokens["x_norm_patchtokens"]}
            if model.n_storage_tokens:
                final["registers"] = tokens["x_storage_tokens"]
            features[f"{height}x{width}"] = {"pixels": pixels, "final": final, "layers": layers_of(model, pixels)}
    torch.save(features, out / "features.pth")


if __name__ == "__main__":
    changed = {"depth": int(sys.argv[4])} | (RECIPE if "RECIPE" in sys.argv else {})
    main(sys.argv[1], sys.argv[2], sys.argv[3], changed, Path(sys.argv[5]))

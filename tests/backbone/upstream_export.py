"""Run by test_upstream.py in a process of its own: Meta's model with seeded weights, its file and its features.

    python upstream_export.py CHECKOUT NAME OUT

Importing upstream changes torch process-wide, which is why it is not imported by a test. Writes OUT/weights.pth (a
plain state dict, as the official files are) and OUT/features.pth: for each "HxW" the normalised pixels, the normed
final tokens by kind, and the tokens of every block before the final norm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def seed_weights(model: torch.nn.Module) -> None:
    """Weights with which a wrong attention or feed-forward shows; masks and periods stay as upstream makes them."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.5)
                continue
            parameter.normal_(0.0, 0.02, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.mul_(5).add_(1)
            if name.endswith("qkv.weight"):
                parameter[: 2 * parameter.shape[1]].mul_(4)


def main(checkout: str, name: str, out: Path) -> None:
    sys.path.insert(0, checkout)
    from dinov3.hub import backbones  # type: ignore[import-not-found]

    model = getattr(backbones, name)(pretrained=False).float().eval()
    seed_weights(model)
    torch.save(model.state_dict(), out / "weights.pth")
    features = {}
    generator = torch.Generator().manual_seed(12)
    for height, width in ((224, 224), (256, 384)):
        pixels = torch.randn(1, 3, height, width, generator=generator)
        with torch.inference_mode():
            final = model.forward_features(pixels)
            layers = model.get_intermediate_layers(
                pixels, n=model.n_blocks, return_class_token=True, return_extra_tokens=True, norm=False
            )
        features[f"{height}x{width}"] = {
            "pixels": pixels,
            "final": {
                "cls": final["x_norm_clstoken"],
                "registers": final["x_storage_tokens"],
                "patches": final["x_norm_patchtokens"],
            },
            "layers": [{"patches": p, "cls": c, "registers": r} for p, c, r in layers],
        }
    torch.save(features, out / "features.pth")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""The registry of model variants, looked up by name. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from dinov3_server.errors import ConfigError
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS
from dinov3_server.families.dinov3_vit.variants import VITS
from dinov3_server.models.variant import Variant

# A new family adds its variants here; they know its network, key maps and repositories.
VARIANTS: Mapping[str, Variant] = MappingProxyType({**VITS, **CONVNEXTS})

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "small": "dinov3_vits16",
        "base": "dinov3_vitb16",
        "large": "dinov3_vitl16",
        "huge": "dinov3_vith16plus",
        "7b": "dinov3_vit7b16",
        "vit_small": "dinov3_vits16",
        "vit_base": "dinov3_vitb16",
        "vit_large": "dinov3_vitl16",
    }
)


def lookup(name: str) -> Variant:
    """Return the variant called `name`: `dinov3_vits16`, `vits16`, or an alias such as `small`.

    Hyphens and underscores are equivalent. Raises ConfigError, listing the known names, for an unknown one.
    """
    key = name.strip().lower().replace("-", "_")
    key = ALIASES.get(key, key)
    variant = VARIANTS.get(key) or VARIANTS.get(f"dinov3_{key}")
    if variant is None:
        raise ConfigError(f"model {name!r} {_why_unknown(key)} Known models: {', '.join(VARIANTS)}.")
    return variant


def _why_unknown(key: str) -> str:
    if "giant" in key or "vitg" in key:
        return (
            "is DINOv2's: DINOv3 has no giant2. The nearest in DINOv3 are dinov3_vith16plus (width 1280) and "
            "dinov3_vit7b16 (width 4096)."
        )
    if key.endswith("14") or "patch14" in key or "dinov2" in key:
        return (
            "is DINOv2's: every DINOv3 vision transformer has a patch of 16, not 14 (so an input of 518 pixels, which "
            "is no multiple of 16, becomes 512 or 528)."
        )
    shorts = [full.removeprefix("dinov3_") for full in VARIANTS]
    nearest = difflib.get_close_matches(key.removeprefix("dinov3_"), [*shorts, *ALIASES], n=1, cutoff=0.6)
    return f"is not known; did you mean {nearest[0]!r}?" if nearest else "is not known."

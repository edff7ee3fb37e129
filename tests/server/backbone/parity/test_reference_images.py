"""The reference images are those of their formula, and never change."""

from __future__ import annotations

import hashlib

import numpy as np

from dinov3_server.backbone.parity.reference_images import SIZES, VERSION, reference_images
from dinov3_server.families.dinov3_convnext.variants import CONVNEXTS
from dinov3_server.families.registry import VARIANTS

HASHES = (
    "07d8cb20822f215a3f04aeb231b31230873dd1742c4623a1a5a921d1690e4dee",
    "73ed9211b9ecf1e132d60abbfe3447017934f90aa0ae5eb3cf7796ae45c38cad",
    "e3346468ff6e8c9a2352e79ba7abfdb33bdfb697c4bed0b49846ece10d375936",
)


def test_the_bytes_never_change() -> None:
    """Where this fails the images have changed: they need a new VERSION, and new hashes here."""
    assert VERSION == 1
    assert tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in reference_images()) == HASHES


def test_images_follow_the_documented_formula() -> None:
    """Written out from the docstring, in Python's own integers."""
    for k, ((height, width), image) in enumerate(zip(SIZES, reference_images(), strict=True)):
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        for y, x, c in ((0, 0, 0), (height // 2, width // 3, 1), (17, width - 1, 2), (height - 1, 40, 0)):
            period = 181 + 50 * k
            m = (2 * x + y + 60 * c + k * x * y // 64) % period
            wave = 255 - abs(510 * m // period - 255)
            if (2 * y - height) ** 2 + (3 * x - width) ** 2 < (height // 2) ** 2:
                wave = 255 - wave
            board = 48 * ((x // 20 + y // 28) % 2)
            grain = (7919 * x + 104729 * y + 1299709 * c + 15485863 * k) ** 2 // 1024 % 32
            assert image[y, x, c] == 5 * wave // 8 + board + grain


def test_every_variant_accepts_every_reference_image() -> None:
    strides = {variant.patch_size for variant in (*VARIANTS.values(), *CONVNEXTS.values())}
    assert not any(side % stride for size in SIZES for side in size for stride in strides)
    assert len(set(SIZES)) == len(SIZES)


def test_images_have_smooth_shades_edges_and_texture() -> None:
    """Every patch has structure: a patch of one color would not tell one pixel of it from another."""
    for image in reference_images():
        cells = image.reshape(image.shape[0] // 16, 16, image.shape[1] // 16, 16, 3)
        assert cells.std(axis=(1, 3)).min() > 5
        assert image.min() < 16
        assert image.max() > 224

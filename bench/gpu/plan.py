"""The plan of a run of `python -m bench.gpu`: everything on a GPU, and the smallest of each without one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dinov3_server.families.dinov3_vit.variants import VITS, VitVariant
from dinov3_server.models.interface import FeatureSpec, Output, OutputSpec

BOTH = (Output("cls"), Output("patches"))
WANTED = tuple(OutputSpec(output, "bfloat16") for output in BOTH)
SPECS = {"cls": FeatureSpec(BOTH[:1], "bfloat16"), "cls+patches": FeatureSpec(BOTH, "bfloat16")}


@dataclass(frozen=True)
class Config:
    """A forward pass: a model, and `batch` square images of `size` pixels."""

    model: str
    size: int
    batch: int

    @property
    def variant(self) -> VitVariant:
        return VITS[f"dinov3_{self.model}"]

    @property
    def tokens(self) -> int:
        """Tokens of one image: CLS, registers and patches."""
        return 1 + self.variant.registers + (self.size // self.variant.patch_size) ** 2

    @property
    def flops(self) -> int:
        """Operations of one image, a multiply-add counts as two: T tokens of width D, P of them patches, feed-forward
        F.

        Patch embedding 2 P (3 16^2) D; a block's linears 2 T D (4 D) + 2 T D F n, n being 2 (MLP) or 3 (SwiGLU); its
        attention 4 T^2 D (scores and weighted sums). Norms, activations, RoPE and softmax count nothing.
        """
        variant, tokens, width = self.variant, self.tokens, self.variant.embed_dim
        projections = 2 if variant.ffn == "mlp" else 3
        embedding = 2 * (self.size // variant.patch_size) ** 2 * 3 * variant.patch_size**2 * width
        linears = 2 * tokens * width * (4 * width + projections * variant.ffn_dim)
        return embedding + variant.depth * (linears + 4 * tokens**2 * width)


@dataclass(frozen=True)
class Plan:
    """The parameters of a run: `seconds` for each figure, `budgets` in seconds for each section, in their order."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    products: tuple[tuple[int, int, int], ...]  # m, n, k of matrix products, the best of which is the peak
    forward: tuple[Config, ...]
    baselines: tuple[Config, ...]
    service: Config  # the batch is the server's largest
    frontends: tuple[int, ...]
    arena: str  # of each frontend
    generators: int  # processes
    in_flight: int  # images, of all generators together
    case_seconds: float
    budgets: dict[str, float]


def full(device: torch.device) -> Plan:
    """Return the plan for a GPU. It fits into 9 minutes on an H200 with 16 cores; each section begins with the most
    important figures."""
    large = Config("vitl16", 256, 64)
    forward = tuple(
        config
        for model in ("vitl16", "vits16", "vitb16", "vith16plus")
        for size in (256, 224, 512)
        for batch in (64, 1, 8, 32, 128)
        if (config := Config(model, size, batch)).tokens * batch <= 34_000
    )
    baselines = (
        *(large, Config("vitb16", 256, 64), Config("vits16", 256, 64), Config("vitl16", 256, 1)),
        *(Config("vith16plus", 256, 64), Config("vits16", 256, 1), Config("vitl16", 512, 8), Config("vitl16", 224, 64)),
    )
    return Plan(
        device=device,
        dtype=torch.bfloat16,
        seconds=0.3,
        products=((8192, 8192, 8192), (16384, 8192, 8192), (16384, 4096, 1024), (16384, 1024, 4096)),
        forward=forward,
        baselines=baselines,
        service=large,
        frontends=(8, 4, 2, 1),
        arena="2GiB",
        generators=6,
        in_flight=384,
        case_seconds=3.0,
        budgets={"peak": 15, "forward": 90, "pipeline": 20, "service": 190, "baselines": 180, "profile": 25},
    )


def dry(device: torch.device) -> Plan:
    """Return the plan of a dry run: every section at the smallest size, to test the script."""
    small = Config("vits16", 32, 2)
    return Plan(
        device=device,
        dtype=torch.float32,
        seconds=0.02,
        products=((64, 64, 64),),
        forward=(small,),
        baselines=(small,),
        service=small,
        frontends=(1,),
        arena="64MiB",
        generators=2,
        in_flight=64,
        case_seconds=2.5,
        budgets={"peak": 60, "forward": 60, "pipeline": 60, "service": 120, "baselines": 120, "profile": 60},
    )

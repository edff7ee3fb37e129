"""The DINOv3 vision transformers: their dimensions, files, and names of tensors. Imports no torch.

Canonical names are the official repository's, with two differences. Queries, keys and values are separate
(`blocks.0.attn.q.weight`; a file's fused `qkv` is split without a copy). Tensors that inference does not use are left
out: the key bias (masked to zero in the published models), `mask_token`, `local_cls_norm`. So the same model from a
file of any format gives the same tensors.

Sources: the official repository's `dinov3/hub/backbones.py` and its model card. Parameter counts are exact
(they include `mask_token` and the masked third of the qkv biases, which inference does not use).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from dinov3_server.models.variant import Dataset, FileTensor, KeyMap, Shape, Variant, known_hashes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dinov3_server.families.dinov3_vit.model import VisionTransformer

PERIODS = "rope_embed.periods"
_DEFAULT_EPS = 1e-6  # of `norm_layer: layernorm` in Meta's training code; the published models have `layernormbf16`


@dataclass(frozen=True, kw_only=True)
class VitVariant(Variant):
    """A DINOv3 vision transformer. Its layers are its blocks."""

    patch_size: int = 16
    registers: int = 4
    norm_eps: float = 1e-5
    heads: int
    ffn: Literal["mlp", "swiglu"]
    ffn_dim: int
    qkv_bias: bool
    key_bias: bool = False  # the bias of keys is used; in the published models it is masked to zero
    rope_base: float = 100.0

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    @property
    def architecture(self) -> str:
        return f"ViT: {self.heads} heads, {self.ffn} {self.ffn_dim}"

    def canonical_shapes(self) -> dict[str, Shape]:
        width, hidden, patch = self.embed_dim, self.ffn_dim, self.patch_size
        shapes: dict[str, Shape] = {
            "cls_token": (1, 1, width),
            "storage_tokens": (1, self.registers, width),
            "patch_embed.proj.weight": (width, 3, patch, patch),
            "patch_embed.proj.bias": (width,),
        }
        for i in range(self.depth):
            block: dict[str, Shape] = {"norm1.weight": (width,), "norm1.bias": (width,)}
            for part in "qkv":
                block[f"attn.{part}.weight"] = (width, width)
                if self.qkv_bias and (part != "k" or self.key_bias):
                    block[f"attn.{part}.bias"] = (width,)
            block |= {"attn.proj.weight": (width, width), "attn.proj.bias": (width,), "ls1.gamma": (width,)}
            block |= {"norm2.weight": (width,), "norm2.bias": (width,)}
            into, out = (("fc1",), "fc2") if self.ffn == "mlp" else (("w1", "w2"), "w3")
            for name in into:
                block |= {f"mlp.{name}.weight": (hidden, width), f"mlp.{name}.bias": (hidden,)}
            block |= {f"mlp.{out}.weight": (width, hidden), f"mlp.{out}.bias": (width,), "ls2.gamma": (width,)}
            shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
        return shapes | {"norm.weight": (width,), "norm.bias": (width,)}

    def constants(self) -> dict[str, Tensor]:
        from dinov3_server.nn.rope import default_periods

        return {PERIODS: default_periods(self.head_dim, self.rope_base)}

    def build(
        self, tensors: Mapping[str, Tensor], dataset: Dataset, *, dtype: torch.dtype, device: torch.device
    ) -> VisionTransformer:
        from dinov3_server.families.dinov3_vit.model import VisionTransformer

        return VisionTransformer(self, tensors, dataset, dtype=dtype, device=device)

    def as_trained(self, names: Collection[str]) -> VitVariant:
        """Return this variant with the registers, key biases and norms that Meta's training code can vary.

        Its default configuration (`n_storage_tokens: 0`, `mask_k_bias: false`, `norm_layer: layernorm`) differs from
        that of the published models in all three. The epsilon of norms is in no file; it is taken to go with the
        masks. A file without any buffers holds parameters alone, so that lacking masks mean nothing there.
        """
        registers = self.registers if "storage_tokens" in names else 0
        is_masked = any(name.endswith(".bias_mask") for name in names)
        key_bias = self.qkv_bias and not is_masked and (PERIODS in names or not registers)
        return replace(
            self,
            registers=registers,
            key_bias=key_bias,
            norm_eps=_DEFAULT_EPS if key_bias else self.norm_eps,
            parameters=self.parameters - (self.registers - registers) * self.embed_dim,
        )

    def training_settings(self) -> dict[str, object]:
        settings: dict[str, object] = {} if self.registers else {"n_storage_tokens": 0}
        return settings | ({"mask_k_bias": False, "norm_layer": "layernorm"} if self.key_bias else {})

    def assumptions(self, names: Collection[str]) -> list[str]:
        notes = []
        if not self.registers:
            notes.append("no storage_tokens: the model has no registers (n_storage_tokens: 0)")
        if self.key_bias:
            notes.append(
                f"no bias_mask: keys have a bias (mask_k_bias: false), and norms the epsilon {self.norm_eps:g} "
                "(norm_layer: layernorm), as in Meta's default training configuration"
            )
        elif self.qkv_bias and not any(name.endswith(".bias_mask") for name in names):
            notes.append("no buffers: the bias of keys is masked to zero, as in Meta's published models")
        if PERIODS not in names:
            notes.append(f"no {PERIODS}: those of Meta's published models are used")
        return notes

    def key_maps(self) -> tuple[KeyMap, ...]:
        timm = _timm(self)
        query_value_biases = {f"blocks.{i}.attn.{part}_bias" for i in range(self.depth) for part in "qv"}
        without_biases = {key: entry for key, entry in timm.items() if key not in query_value_biases}
        return (
            KeyMap("official", _official(self)),
            KeyMap("transformers", _transformers(self), _normalize_transformers_key),
            # `vit_*_patch16_dinov3` does not store these biases: timm's authors found them to be zeros. It comes before
            # the one with biases, a superset of it, so that a file without biases matches this one.
            KeyMap("timm", without_biases),
            KeyMap("timm (qkvb)", timm),
        )


def _official(variant: VitVariant) -> dict[str, FileTensor]:
    width = variant.embed_dim
    entries: dict[str, FileTensor] = {
        "mask_token": FileTensor((1, width), required=False),
        # In models trained with a separate norm for local crops: 7B, and ViT-L on SAT-493M.
        "local_cls_norm.weight": FileTensor((width,), required=False),
        "local_cls_norm.bias": FileTensor((width,), required=False),
        PERIODS: FileTensor((variant.head_dim // 4,), (PERIODS,), required=False),
    }
    for name, shape in variant.canonical_shapes().items():
        prefix, attn, rest = name.partition("attn.")
        if not attn or rest.startswith("proj"):
            if 0 not in shape:  # without registers, there is no tensor of them
                entries[name] = FileTensor(shape, (name,))
        elif rest == "q.weight":
            entries[f"{prefix}attn.qkv.weight"] = FileTensor((3 * width, width), _fused(prefix))
        elif rest == "q.bias":
            k = f"{prefix}attn.k.bias" if variant.key_bias else None
            entries[f"{prefix}attn.qkv.bias"] = FileTensor((3 * width,), (name, k, f"{prefix}attn.v.bias"))
            if not variant.key_bias:
                entries[f"{prefix}attn.qkv.bias_mask"] = FileTensor((3 * width,), required=False, is_bias_mask=True)
    return entries


def _fused(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}attn.{part}.weight" for part in "qkv")


_TRANSFORMERS_OUTER = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_TRANSFORMERS_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "ls1": "layer_scale1",
    "ls2": "layer_scale2",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.up_proj",
    "mlp.w3": "mlp.down_proj",
}


def _transformers(variant: VitVariant) -> dict[str, FileTensor]:
    entries = {"embeddings.mask_token": FileTensor((1, 1, variant.embed_dim), required=False)}
    for name, shape in variant.canonical_shapes().items():
        if name in _TRANSFORMERS_OUTER:
            key = _TRANSFORMERS_OUTER[name]
        else:
            _, index, inner = name.split(".", 2)
            module, _, leaf = inner.rpartition(".")
            key = f"layer.{index}.{_TRANSFORMERS_BLOCK[module]}.{'lambda1' if leaf == 'gamma' else leaf}"
        entries[key] = FileTensor(shape, (name,))
    return entries


def _normalize_transformers_key(key: str) -> str:
    """Return the key as in files on the hub, `layer.0`; newer transformers classes save `model.layer.0`."""
    return key.removeprefix("model.") if key.startswith("model.layer.") else key


_TIMM_NAMES = {
    "storage_tokens": "reg_token",
    "ls1.gamma": "gamma_1",
    "ls2.gamma": "gamma_2",
    "attn.q.bias": "attn.q_bias",
    "attn.v.bias": "attn.v_bias",
    "mlp.w1.weight": "mlp.fc1_g.weight",
    "mlp.w1.bias": "mlp.fc1_g.bias",
    "mlp.w2.weight": "mlp.fc1_x.weight",
    "mlp.w2.bias": "mlp.fc1_x.bias",
    "mlp.w3.weight": "mlp.fc2.weight",
    "mlp.w3.bias": "mlp.fc2.bias",
}


def _timm(variant: VitVariant) -> dict[str, FileTensor]:
    """Return the tensors of `vit_*_patch16_dinov3_qkvb` (timm's `models/eva.py`), with biases of queries and values.

    Also those of `vit_7b_patch16_dinov3`, a variant without such biases.
    """
    width = variant.embed_dim
    entries = {}
    for name, shape in variant.canonical_shapes().items():
        inner = name.split(".", 2)[2] if name.startswith("blocks.") else name
        prefix = name.removesuffix(inner)
        if inner == "attn.q.weight":
            entries[f"{prefix}attn.qkv.weight"] = FileTensor((3 * width, width), _fused(prefix))
        elif inner not in ("attn.k.weight", "attn.v.weight"):
            entries[prefix + _TIMM_NAMES.get(inner, inner)] = FileTensor(shape, (name,))
    return entries


def _vit(
    arch: str,
    dimensions: tuple[int, int, int],
    ffn: Literal["mlp", "swiglu"],
    ffn_dim: int,
    parameters: int,
    timm: str = "",
    qkv_bias: bool = True,
    **hashes: str,
) -> VitVariant:
    """Describe a variant; `timm` is the name of timm's conversion, "" if the weights are not on Hugging Face."""
    embed_dim, depth, heads = dimensions
    repositories = f"facebook/dinov3-{arch}-pretrain-{{dataset}}", f"timm/{timm}.{{dataset}}"
    return VitVariant(
        name=f"dinov3_{arch}",
        embed_dim=embed_dim,
        depth=depth,
        parameters=parameters,
        hashes=known_hashes(hashes),
        heads=heads,
        ffn=ffn,
        ffn_dim=ffn_dim,
        qkv_bias=qkv_bias,
        repositories=repositories if timm else (),
    )


VITS: Mapping[str, VitVariant] = MappingProxyType(
    {
        variant.name: variant
        for variant in (
            _vit("vits16", (384, 12, 6), "mlp", 1536, 21_601_152, "vit_small_patch16_dinov3", lvd1689m="08c60483"),
            _vit(
                "vits16plus", (384, 12, 6), "swiglu", 1536, 28_697_472, "vit_small_plus_patch16_dinov3",
                lvd1689m="4057cbaa",
            ),
            _vit("vitb16", (768, 12, 12), "mlp", 3072, 85_669_632, "vit_base_patch16_dinov3", lvd1689m="73cec8be"),
            _vit(
                "vitl16", (1024, 24, 16), "mlp", 4096, 303_154_176, "vit_large_patch16_dinov3",
                lvd1689m="8aa4cbdd", sat493m="eadcf0ff",
            ),
            _vit("vitl16plus", (1024, 24, 16), "swiglu", 4096, 403_915_776, lvd1689m="46503df0"),
            _vit(
                "vith16plus", (1280, 32, 20), "swiglu", 5120, 840_633_600, "vit_huge_plus_patch16_dinov3",
                lvd1689m="7c1da9a5",
            ),
            _vit(
                "vit7b16", (4096, 40, 32), "swiglu", 8192, 6_716_043_264, "vit_7b_patch16_dinov3", False,
                lvd1689m="a955f4ea", sat493m="a6675841",
            ),
        )
    }
)  # fmt: skip

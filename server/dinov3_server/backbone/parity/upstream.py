"""Meta's own modules, imported from a checkout of their repository, with the weights of a checkpoint.

Only `dinov3.hub.backbones` is used, whose functions create a model by name; Meta's weight loaders are never used.
Importing the code changes settings of torch for the whole process. So it is imported only in a process that does
nothing else (`upstream_process.py`), or in a worker that serves it (`--backbone reference`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_server.backbone.weights.checkpoint import Checkpoint
from dinov3_server.errors import UpstreamCodeError
from dinov3_server.models.interface import Output, TokenKind
from dinov3_server.models.variant import FileTensor
from dinov3_server.nn.model import Model

_PACKAGE = "dinov3"
_ENTRY_POINTS = "dinov3.hub.backbones"
# Tensors for training only: a file may lack them, or have them although the created model does not.
_UNUSED = frozenset({"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"})
# How much of an error of Meta's code our messages quote.
_MOST_LINES, _LONGEST_LINE = 4, 300


class UpstreamModel(Model):
    """Meta's model. It has no cached tensors: its RoPE table is computed in every forward pass.

    In bfloat16 it computes like Meta's evaluation, under autocast: matrix products in bfloat16, everything else and the
    residual stream in float32. The weights of those products are rounded once, at load, instead of at every call by
    autocast; the results are the same.
    """

    def __init__(self, checkout: Path, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.variant = checkpoint.variant
        self.dtype = dtype
        self.device = device
        self._module = load_upstream(checkout, checkpoint, device)
        if dtype == torch.float32:
            # Convolutions use TF32 by default, which rounds their inputs to 10 bits. Disabled for the whole process.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            for module in self._module.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)
        # On the device from the start: a CUDA graph cannot contain a copy from the host.
        self._mean = torch.tensor(checkpoint.dataset.mean, device=device)
        self._std = torch.tensor(checkpoint.dataset.std, device=device)

    def __call__(self, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
        """Compute features, as `Model` describes. Meta's code would crop sizes that are no multiples silently."""
        by_layer: dict[tuple[int | None, bool], list[Output]] = {}
        for output in outputs:
            by_layer.setdefault((output.layer, output.norm), []).append(output)
        if pixels.dtype == torch.uint8:
            pixels = ((pixels.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()
        features: dict[Output, Tensor] = {}
        # No cache: there is nothing to cache, and it would not work in a CUDA graph.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            for (layer, norm), group in by_layer.items():
                tokens = self._final(pixels) if layer is None else self._layer(pixels, layer, norm)
                features |= {output: tokens[output.kind].float() for output in group}
        return features

    def features(self, pixels: Tensor, outputs: Iterable[Output]) -> Iterator[tuple[Output, Tensor]]:
        """Yield each output of a call. Meta's code computes all of them first."""
        yield from self(pixels, outputs).items()

    def _final(self, pixels: Tensor) -> dict[TokenKind, Tensor]:
        found = self._module.forward_features(pixels)
        return {
            "cls": found["x_norm_clstoken"],
            "registers": found["x_storage_tokens"],
            "patches": found["x_norm_patchtokens"],
        }

    def _layer(self, pixels: Tensor, layer: int, norm: bool) -> dict[TokenKind, Tensor]:
        # A ConvNeXt's method does not take this argument.
        extra = {"return_extra_tokens": True} if self.variant.registers else {}
        (parts,) = self._module.get_intermediate_layers(pixels, n=[layer], return_class_token=True, norm=norm, **extra)
        return dict(zip(("patches", "cls", "registers"), parts, strict=False))


def load_upstream(checkout: Path, checkpoint: Checkpoint, device: torch.device) -> Any:
    """Create Meta's module for the checkpoint's variant in fp32, in evaluation mode, with the checkpoint's weights.

    The tensors of a file in Meta's own format are loaded under the file's own keys, independently of our key maps.
    Raises UpstreamCodeError if Meta's code cannot be used.
    """
    name = checkpoint.variant.name
    try:
        backbones: Any = _import_from(checkout)
        make = getattr(backbones, name)
        if settings := checkpoint.variant.training_settings():
            construct = backbones._make_dinov3_vit  # what `make` calls, with the settings of the published models
            backbones._make_dinov3_vit = lambda **published: construct(**published | settings)
        # On the meta device: no memory and no time for initial weights that are replaced anyway.
        with torch.device("meta"):
            module = make(pretrained=False)
        state = official_tensors(checkpoint)
        module.load_state_dict(_fitted(state, module.state_dict(), device), strict=True, assign=True)
    except Exception as error:
        raise UpstreamCodeError(
            f"Meta's code in {checkout} does not make {name} of these weights: {_short(error)}"
        ) from error
    return module.eval().requires_grad_(False)


def _short(error: Exception) -> str:
    """Return the type and first lines of an error: torch lists every state-dict key that does not match."""
    text = ": ".join(filter(None, (type(error).__name__, str(error))))
    return "\n".join(map(cut, text.splitlines()[:_MOST_LINES]))


def cut(line: str) -> str:
    """Shorten a line of foreign output for our messages."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def official_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights under Meta's state-dict keys.

    They are the file's own tensors if it is in Meta's format. Those that it does not have, and all of another format,
    are the canonical tensors, with the key map of Meta's format applied in reverse.
    """
    entries = next(key_map.entries for key_map in checkpoint.variant.key_maps() if key_map.name == "official")
    own = checkpoint.official or {}
    state = {**own, **_translated(checkpoint, {key: entry for key, entry in entries.items() if key not in own})}
    for key, entry in entries.items():
        if entry.same_as is not None:
            state[key] = state[entry.same_as]
    return state


def _translated(checkpoint: Checkpoint, entries: Mapping[str, FileTensor]) -> dict[str, Tensor]:
    tensors = checkpoint.tensors
    state = {}
    for key, entry in entries.items():
        if entry.is_bias_mask:
            ones = torch.ones(entry.shape[0] // 3)
            state[key] = torch.cat((ones, torch.zeros_like(ones), ones))  # queries, keys, values
        elif entry.parts:
            shape = (entry.shape[0] // len(entry.parts), *entry.shape[1:])
            parts = [torch.zeros(shape) if part is None else tensors[part].float() for part in entry.parts]
            state[key] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return state


def _fitted(state: Mapping[str, Tensor], made: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return `state` in fp32 on the device, with exactly those of the `_UNUSED` tensors that the created module has."""
    fitted = {
        key: tensor.to(device, torch.float32) for key, tensor in state.items() if key in made or key not in _UNUSED
    }
    for key in _UNUSED & made.keys() - state.keys():
        fitted[key] = torch.zeros(made[key].shape, device=device)
    return fitted


def _import_from(checkout: Path) -> ModuleType:
    """Import `dinov3.hub.backbones` from this checkout, even if another package named dinov3 is installed."""
    checkout = checkout.resolve()  # like the modules' __file__
    if _ENTRY_POINTS not in sys.modules:
        sys.meta_path.insert(0, _CheckoutFinder(checkout))
        # Meta's code imports torch's compiler, which is not used here and creates a cache folder under /tmp at once.
        # A read-only container has no /tmp, so name a folder that exists.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/")
    module = importlib.import_module(_ENTRY_POINTS)
    if not Path(str(module.__file__)).is_relative_to(checkout):
        raise ImportError(f"this process has {_PACKAGE} from {module.__file__} already")
    return module


class _CheckoutFinder(MetaPathFinder):
    """An import hook that finds the package `dinov3` only in a checkout, and no other package there."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != _PACKAGE:
            return None
        folder = path[0] if path else str(self.checkout)
        spec = FileFinder(folder, (_SourceLoader, [".py"])).find_spec(fullname)
        if spec is None:
            raise ModuleNotFoundError(f"no module {fullname!r} in {self.checkout}", name=fullname)
        return spec


class _SourceLoader(SourceFileLoader):
    """Compiles sources without __pycache__: cached bytecode cannot be trusted, and a checkout is not written to."""

    def get_code(self, fullname: str) -> CodeType | None:
        return self.source_to_code(self.get_data(self.path), self.path)

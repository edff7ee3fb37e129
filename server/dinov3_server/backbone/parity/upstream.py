"""Meta's own modules, from a checkout of their repository, with the weights of a checkpoint of ours.

Their code is reached through `dinov3.hub.backbones` alone, whose functions make a model by its name, and their loaders
of weights are never used. Importing it changes settings of torch for the whole process: it is imported in a process
that does nothing else (`upstream_process.py`), or in a worker that serves it (`--backbone reference`).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dinov3_server.backbone.weights.checkpoint import Checkpoint
from dinov3_server.errors import UpstreamCodeError
from dinov3_server.families.dinov3_vit.key_maps import PERIODS
from dinov3_server.models.interface import Output, TokenKind
from dinov3_server.models.key_map import FileTensor

_PACKAGE = "dinov3"
_ENTRY_POINTS = "dinov3.hub.backbones"
# What training uses and inference does not: a file may lack it, or have it where the model as it is made has not.
_UNUSED = frozenset({"mask_token", "local_cls_norm.weight", "local_cls_norm.bias"})
# Of an error of theirs, what a message of ours quotes.
_MOST_LINES, _LONGEST_LINE = 4, 300


class UpstreamModel:
    """Meta's model, called as ours are: `model(pixels, outputs)` gives the features of a batch.

    In bfloat16 it computes as their evaluation does, under autocast: matrix products in bfloat16, everything else and
    the residual stream in float32. The weights of those products are rounded once, at load, where autocast would do it
    at every call; the results are the same.
    """

    def __init__(self, checkout: Path, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> None:
        self.variant = checkpoint.variant
        self.dtype = dtype
        self.device = device
        self._module = load_upstream(checkout, checkpoint, device)
        if dtype == torch.float32:
            # Of convolutions TF32 is on by default: it rounds what they multiply to 10 bits. For the whole process.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        else:
            for module in self._module.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.to(dtype)
        # On the device once and for all: a copy from the host would be no part of a CUDA graph.
        self._mean = torch.tensor(checkpoint.dataset.mean, device=device)
        self._std = torch.tensor(checkpoint.dataset.std, device=device)

    def __call__(self, pixels: Tensor, outputs: Iterable[Output]) -> dict[Output, Tensor]:
        """Features of `pixels`: [B, H, W, 3] uint8 RGB or [B, 3, H, W] normalised floats, H and W multiples of the
        patch size, which upstream would crop silently.

        Gives for each output a [B, D] (cls) or [B, tokens, D] fp32 tensor.
        """
        wanted: dict[tuple[int | None, bool], list[Output]] = {}
        for output in outputs:
            wanted.setdefault((output.layer, output.norm), []).append(output)
        if pixels.dtype == torch.uint8:
            pixels = ((pixels.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2).contiguous()
        features: dict[Output, Tensor] = {}
        # cache_enabled: there is nothing to cache, and a cache would be no part of a CUDA graph.
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
            for (layer, norm), group in wanted.items():
                tokens = self._final(pixels) if layer is None else self._layer(pixels, layer, norm)
                features |= {output: tokens[output.kind].float() for output in group}
        return features

    def cached_tensors(self, height: int, width: int) -> tuple[Tensor, ...]:
        """None: Meta's code makes its RoPE table anew in every forward pass."""
        return ()

    def _final(self, pixels: Tensor) -> dict[TokenKind, Tensor]:
        found = self._module.forward_features(pixels)
        return {
            "cls": found["x_norm_clstoken"],
            "registers": found["x_storage_tokens"],
            "patches": found["x_norm_patchtokens"],
        }

    def _layer(self, pixels: Tensor, layer: int, norm: bool) -> dict[TokenKind, Tensor]:
        # A ConvNeXt's method knows no extra tokens.
        extra = {"return_extra_tokens": True} if self.variant.registers else {}
        (parts,) = self._module.get_intermediate_layers(pixels, n=[layer], return_class_token=True, norm=norm, **extra)
        return dict(zip(("patches", "cls", "registers"), parts, strict=False))


def load_upstream(checkout: Path, checkpoint: Checkpoint, device: torch.device) -> Any:
    """Meta's module for the checkpoint's variant in fp32, in evaluation mode, with the checkpoint's weights.

    Where the file names its tensors as Meta does, those are loaded as they are, so that our reading of the names has no
    part in it. Raises UpstreamCodeError where Meta's code cannot be used.
    """
    name = checkpoint.variant.name
    try:
        make = getattr(_import_from(checkout), name)
        # On no device, so that it takes neither memory for weights that are replaced nor time to draw them.
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
    """The kind and beginning of an error: torch names every key of a state dict that does not fit."""
    text = ": ".join(filter(None, (type(error).__name__, str(error))))
    return "\n".join(map(cut, text.splitlines()[:_MOST_LINES]))


def cut(line: str) -> str:
    """A line of somebody else's words, no longer than a message of ours can quote."""
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def official_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights under the names of Meta's state dict: the file's own where it has those, else the canonical tensors
    by the layout that reads official files, backwards."""
    entries = next(key_map.entries for key_map in checkpoint.variant.key_maps() if key_map.name == "official")
    state = dict(checkpoint.official or _translated(checkpoint, entries))
    for key, entry in entries.items():
        if entry.same_as is not None:
            state[key] = state[entry.same_as]
    return state


def _translated(checkpoint: Checkpoint, entries: Mapping[str, FileTensor]) -> dict[str, Tensor]:
    tensors = dict(checkpoint.tensors)
    if checkpoint.periods is not None:
        tensors[PERIODS] = checkpoint.periods
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
    """`state` in fp32 on the device, with those unused tensors that the module as it was made has, and no others."""
    fitted = {
        key: tensor.to(device, torch.float32) for key, tensor in state.items() if key in made or key not in _UNUSED
    }
    for key in _UNUSED & made.keys() - state.keys():
        fitted[key] = torch.zeros(made[key].shape, device=device)
    return fitted


def _import_from(checkout: Path) -> ModuleType:
    """`dinov3.hub.backbones` of this checkout, whatever else is called dinov3 on this machine."""
    checkout = checkout.resolve()  # as modules have their files
    if _ENTRY_POINTS not in sys.modules:
        sys.meta_path.insert(0, _CheckoutFinder(checkout))
        # It imports torch's compiler, which nothing here uses, and that makes a folder for its cache at once, under
        # /tmp: a read-only container has none. A folder that exists need not be made.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", "/")
    module = importlib.import_module(_ENTRY_POINTS)
    if not Path(str(module.__file__)).is_relative_to(checkout):
        raise ImportError(f"this process has {_PACKAGE} from {module.__file__} already")
    return module


class _CheckoutFinder(MetaPathFinder):
    """Finds the package `dinov3` in a checkout and nowhere else, and nothing else in the checkout."""

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
    """Compiles the source itself: what lies in a __pycache__ may be of anything, and a checkout is not written to."""

    def get_code(self, fullname: str) -> CodeType | None:
        return self.source_to_code(self.get_data(self.path), self.path)

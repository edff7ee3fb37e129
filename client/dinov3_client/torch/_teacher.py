"""A remote teacher for distillation code that expects a local model. B images, N patches, D channels."""

from __future__ import annotations

import difflib
import operator
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, get_args

import grpc
import numpy as np
import torch
from torch import nn

from dinov3_client import Client, Features, Model, ModelMismatch
from dinov3_client._checks import check_choice
from dinov3_client._dtypes import Array
from dinov3_client._files import atomic_path
from dinov3_client._pytorch import not_compiled
from dinov3_serving.features import FeatureDtype, TokenKind

Layout = Literal["BCHW", "BHWC"]
FeatureType = Literal["cls_token", "patch_tokens"]

_OUTPUTS: dict[FeatureType, TokenKind] = {"cls_token": "cls", "patch_tokens": "patches"}
# Model names used in configurations; full names are accepted too.
_ALIASES = {"small": "vits16", "base": "vitb16", "large": "vitl16", "huge": "vith16plus", "7b": "vit7b16"}
_OFFICIAL_FILE = re.compile(r"(dinov3_\w+_pretrain_\w+)-[0-9a-f]{8}\.pth")
_OFFICIAL_REPOSITORY = re.compile(r"(?:hf://)?facebook/(dinov3-[\w-]+-pretrain-\w+)(?:@\w+)?")


class RemoteDinoV3Teacher(nn.Module):
    """A frozen DINOv3 teacher on a dinov3-serving server, without parameters and gradients.

    config: a mapping, or the path of a YAML file, with the keys (all optional)
        model_type: must name the served model, such as dinov3_vitb16, vitb16, base or vit_base.
        checkpoint_path: must name the served weights: file name, hf://OWNER/REPO, fingerprint or the model's name; for
            Meta's own, the file and the repository count as the same. The file is not read and need not exist here.
        patch_size: must be that of the served model.
        extract_cls_token, extract_patch_tokens: which features to return; default true.
        device: of the returned tensors; default, or "auto": CUDA if available. `.to()` changes it.
        feature_output_dir: the folder for saved features.
        Other keys are ignored; those that look like a misspelling of a missing one of these are warned of.
    client, target: the client to use, or the server to connect to.
    layout: of the images, "BCHW" or "BHWC". It is never guessed.
    dtype: the dtype in which features are sent. Tensors are float32 anyway, unless `.to()` or `.half()` changes that.

    Raises ModelMismatch if the server serves another model than `config` names, and in any later call that is answered
    by another model than the first.
    """

    _like: torch.Tensor

    def __init__(
        self,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        client: Client | None = None,
        target: str | Sequence[str] | None = None,
        layout: Layout = "BCHW",
        dtype: FeatureDtype = "float16",
    ) -> None:
        super().__init__()
        self._config = _Config.read(config)
        check_choice("layout", layout, get_args(Layout))
        check_choice("dtype", dtype, get_args(FeatureDtype))
        if client is None and target is not None:
            client, target = Client(target), None
        if client is None or target is not None:
            raise ValueError("a teacher needs a client or the target of a server, one of the two")
        self._client = client
        self._layout = layout
        self._dtype = dtype
        self._model = client.model()
        self._config.check(self._model)
        # An empty buffer, so that `.to()`, `.cuda()` and `.half()` set the features' device and dtype, as for a model.
        self.register_buffer("_like", _empty(self._config.device), persistent=False)

    @not_compiled
    def extract_features(
        self,
        images: torch.Tensor | Array,
        image_ids: Sequence[str | int] | torch.Tensor | None = None,
        save_features: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return {"cls_token": [B, D], "patch_tokens": [B, N, D]}, or one of them; patches do not include registers.

        images: [B, 3, H, W] or [B, H, W, 3], by `layout`; a single image without B is a batch of one. uint8 is RGB
            pixels. Floating point must be normalized by the model's mean and std (`get_model_info()`): impossible
            values are refused, and values within 0 to 1 cause a warning. H and W are multiples of the patch size:
            nothing is resized.
        image_ids: a name (or a whole number) for each image, needed only for saving.
        save_features: write `{image_id}_dinov3_features.npz` to `feature_output_dir` for each image, atomically, with
            the arrays cls_token [D] and patch_tokens [N, D] in float32.

        Raises ValueError or TypeError for invalid arguments, OSError if a file cannot be written, else Dinov3Error.
        """
        pixels = _pixels(images, self._layout)
        paths = self._paths(image_ids, len(pixels)) if save_features else []
        features = self._client.extract(
            pixels, [_OUTPUTS[name] for name in self._config.feature_types], preset="none", dtype=self._dtype
        )
        if features.fingerprint != self._model.fingerprint:
            raise _mismatch(
                f"features came from the model with fingerprint {features.fingerprint!r}; this teacher began with "
                f"{self._model.fingerprint!r} ({self._model.name}, {self._model.weights})"
            )
        if paths:
            self._save(features, paths)
        copied = features.torch(pin_memory=self._like.is_cuda)
        tensors = copied.to(self._like.device, self._like.dtype, non_blocking=True)
        return {name: getattr(tensors, _OUTPUTS[name]) for name in self._config.feature_types}

    @not_compiled
    def forward(self, x: torch.Tensor | Array) -> dict[str, torch.Tensor]:
        """Call `extract_features` without saving."""
        return self.extract_features(x)

    def get_feature_types(self) -> list[str]:
        """Return the keys of the features."""
        return list(self._config.feature_types)

    def get_feature_dims(self) -> dict[str, int]:
        """Return D of each feature."""
        return dict.fromkeys(self._config.feature_types, self._model.embed_dim)

    def get_feature_strides(self) -> list[int]:
        """Return [height and width of a patch in pixels]."""
        return [self._model.patch_size]

    def get_model_info(self) -> dict[str, Any]:
        """Describe the served model, with the keys that training code logs. `num_parameters` counts the server's."""
        model = self._model
        return {
            "model_name": model.name,
            "model_type": self._config.model_type or model.name,
            "checkpoint_path": self._config.checkpoint_path or model.weights,
            "weights": model.weights,
            "fingerprint": model.fingerprint,
            "patch_size": model.patch_size,
            "mean": model.mean,
            "std": model.std,
            "feature_types": self.get_feature_types(),
            "feature_dims": self.get_feature_dims(),
            "num_parameters": model.parameters,
            "num_trainable_parameters": 0,
            "frozen": True,
        }

    def _replicate_for_data_parallel(self) -> RemoteDinoV3Teacher:
        """Refuse torch's DataParallel, which replicates a module for each GPU and batch."""
        raise RuntimeError(
            "DataParallel cannot hold a remote teacher: it would send a part of each batch from a thread for each GPU. "
            "Call the teacher outside of the module that is wrapped, or use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        return f"{self._model.name}, {self._model.weights}, layout={self._layout}"

    def _paths(self, image_ids: Sequence[str | int] | torch.Tensor | None, count: int) -> list[Path]:
        if self._config.feature_output_dir is None:
            raise ValueError("save_features needs the key feature_output_dir in the configuration")
        if image_ids is None or isinstance(image_ids, str) or len(image_ids) != count:
            given = "none" if image_ids is None else repr(image_ids) if isinstance(image_ids, str) else len(image_ids)
            raise ValueError(f"save_features needs image_ids, a name for each of {count} images; given: {given}")
        names = [_name(image_id) for image_id in image_ids]
        if len(set(names)) < count:
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"image_ids has {twice!r} twice; one's features would replace the other's")
        return [self._config.feature_output_dir / f"{name}_dinov3_features.npz" for name in names]

    def _save(self, features: Features, paths: Sequence[Path]) -> None:
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: getattr(features, _OUTPUTS[name]) for name in self._config.feature_types}
        for row, path in enumerate(paths):
            with atomic_path(path) as draft, draft.open("wb") as file:
                np.savez(file, **{name: array[row].astype(np.float32) for name, array in arrays.items()})


@dataclass(frozen=True)
class _Config:
    """The configuration of a teacher."""

    model_type: str | None = None
    checkpoint_path: str | None = None
    patch_size: int | None = None
    extract_cls_token: bool = True
    extract_patch_tokens: bool = True
    device: str | None = None
    feature_output_dir: Path | None = None

    @property
    def feature_types(self) -> tuple[FeatureType, ...]:
        wanted = (self.extract_cls_token, self.extract_patch_tokens)
        return tuple(name for name, asked in zip(get_args(FeatureType), wanted, strict=True) if asked)

    @classmethod
    def read(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> _Config:
        given = _mapping(config)
        kinds: dict[str, tuple[type, ...]] = {
            "model_type": (str,),
            "checkpoint_path": (str, os.PathLike),
            "patch_size": (int,),
            "extract_cls_token": (bool,),
            "extract_patch_tokens": (bool,),
            "device": (str, torch.device),
            "feature_output_dir": (str, os.PathLike),
        }
        _warn_of_misspellings(given, kinds)
        found: dict[str, Any] = {key: given[key] for key in kinds if given.get(key) is not None}
        for key, value in found.items():
            if not isinstance(value, kinds[key]) or (key == "patch_size" and isinstance(value, bool)):
                allowed = " or ".join(kind.__name__ for kind in kinds[key])
                raise TypeError(f"{key} is {value!r} in the configuration; it must be {allowed}")
        for key, make in (("checkpoint_path", os.fspath), ("device", str), ("feature_output_dir", Path)):
            if key in found:
                found[key] = make(found[key])
        self = cls(**found)
        if not self.feature_types:
            raise ValueError("extract_cls_token and extract_patch_tokens are both false: there is nothing to extract")
        return self

    def check(self, model: Model) -> None:
        """Raise ModelMismatch if the server's `model` is not the one that the configuration names."""
        served = f"the server serves {model.name} with the weights {model.weights!r} (fingerprint {model.fingerprint})"
        if self.model_type is not None and _full_name(self.model_type) != model.name:
            raise _mismatch(f"model_type is {self.model_type!r}; {served}{_of_dinov2(self.model_type)}")
        if self.patch_size is not None and self.patch_size != model.patch_size:
            raise _mismatch(f"patch_size is {self.patch_size}; {served}, whose patches have {model.patch_size} pixels")
        path = self.checkpoint_path
        if path is not None and not _names(path, model):
            raise _mismatch(
                f"checkpoint_path is {path!r}; {served}. It may be the weights' file name, their fingerprint or the "
                f"model's name, or be left out{_of_dinov2(path)}"
            )


def _names(given: str, model: Model) -> bool:
    """Return whether a checkpoint_path names the weights of `model`."""
    if given in (model.weights, model.fingerprint) or _full_name(given) == model.name:
        return True
    if _official(given) is not None and _official(given) == _official(model.weights):
        return True
    if model.weights.startswith("hf://"):
        repository = model.weights.removeprefix("hf://").partition("@")[0]
        return given.removeprefix("hf://") == repository
    return PurePath(given).name == PurePath(model.weights).name


def _official(weights: str) -> str | None:
    """Return the name that Meta's file of weights and its repository on Hugging Face have in common."""
    found = _OFFICIAL_FILE.fullmatch(PurePath(weights).name) or _OFFICIAL_REPOSITORY.fullmatch(weights)
    return found and found[1].replace("_", "-")


def _full_name(name: str) -> str:
    key = name.strip().lower().replace("-", "_").removeprefix("dinov3_")
    key = _ALIASES.get(key.removeprefix("vit_"), key)
    return f"dinov3_{key}"


def _of_dinov2(name: str) -> str:
    key = PurePath(name).name.lower()
    of = any(mark in key for mark in ("14", "giant", "vitg", "dinov2"))
    return ". (That is a name of DINOv2: DINOv3 has patches of 16 pixels and no giant2)" if of else ""


def _mismatch(message: str) -> ModelMismatch:
    return ModelMismatch(message, code=grpc.StatusCode.FAILED_PRECONDITION)


def _mapping(config: object) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if isinstance(config, str | os.PathLike):
        return _yaml(Path(config))
    raise TypeError(
        f"config is a {type(config).__name__}; it must be a mapping, such as vars(config) of a namespace, or the path "
        "of a YAML file"
    )


def _warn_of_misspellings(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Warn once of all keys that may be meant to be a key that is missing: other code has keys of its own."""
    meant = {}
    for key in given:
        near = difflib.get_close_matches(str(key), [name for name in known if name not in given], n=1, cutoff=0.85)
        if key not in known and near and near[0][0] == str(key)[0]:  # unlike batch_size and patch_size
            meant[key] = near[0]
    if meant:
        pairs = ", ".join(f"{key!r} (did you mean {name!r}?)" for key, name in meant.items())
        warnings.warn(f"the teacher ignores these keys of its configuration: {pairs}", stacklevel=4)


def _yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            f"reading {path} needs the package pyyaml (pip install pyyaml); a teacher also takes a mapping"
        ) from None
    loaded = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds no mapping of keys to values but {type(loaded).__name__}")
    return loaded


def _empty(device: str | None) -> torch.Tensor:
    device = None if device == "auto" else device
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ValueError(f"device is {device!r}, which cannot be used here: {error}") from None


def _pixels(images: torch.Tensor | Array, layout: Layout) -> Array:
    """Convert images to the client's formats: [B, H, W, 3] uint8 or [B, 3, H, W] float32."""
    if isinstance(images, torch.Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    if not isinstance(images, np.ndarray):
        raise TypeError(f"images is a {type(images).__name__}; it must be a tensor or an array in the layout {layout}")
    batch = images[None] if images.ndim == 3 else images
    channels = layout.index("C")
    if batch.ndim != 4 or batch.shape[channels] != 3:
        raise ValueError(
            f"images has the shape {list(images.shape)}; with layout={layout!r} it must be {_shape(layout)}, or that "
            "without B for one image (a teacher's layout is BCHW or BHWC, as it was made)"
        )
    if batch.dtype == np.uint8:
        return np.ascontiguousarray(batch.transpose(0, 2, 3, 1) if layout == "BCHW" else batch)
    if np.issubdtype(batch.dtype, np.floating):
        return np.ascontiguousarray(batch.transpose(0, 3, 1, 2) if layout == "BHWC" else batch, np.float32)
    raise TypeError(
        f"images are of {batch.dtype}; they must be uint8 (RGB pixels) or floating point (normalized by the model's "
        "mean and std)"
    )


def _name(image_id: object) -> str:
    """Return the file name of an image id; a DataLoader turns whole numbers into tensors."""
    try:
        name = image_id if isinstance(image_id, str) else str(operator.index(image_id))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"image id {image_id!r} is a {type(image_id).__name__}; it must be str or int") from None
    if not name or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"image id {name!r} is not a plain file name; its features would be in another folder")
    return name


def _shape(layout: Iterable[str]) -> str:
    return f"[{', '.join('3' if axis == 'C' else axis for axis in layout)}]"

"""The client of dinov3-serving: DINOv3 features of images as numpy arrays.

    from dinov3_client import Client

    with Client("localhost:50051") as client:
        features = client.extract(["a.jpg", "b.jpg"])
        features.cls, features.patches  # [2, D], [2, P, D]

Imports neither torch nor anything of the server.
"""

from dinov3_client._answer import Timings
from dinov3_client._async_client import AsyncClient
from dinov3_client._client import Client
from dinov3_client._errors import (
    DeadlineExceeded,
    Dinov3Error,
    FieldViolation,
    ImageErrors,
    InvalidRequest,
    InvalidResponse,
    MessageTooLarge,
    MixedSizes,
    ModelMismatch,
    Overloaded,
    ServerError,
    StatusError,
    Unauthenticated,
    Unavailable,
)
from dinov3_client._features import Features, ImageFeatures, LayerFeatures
from dinov3_client._fit import Fit
from dinov3_client._images import ImageViews
from dinov3_client._model import Model
from dinov3_client._request import ExtractOptions, Layer, Pooling
from dinov3_client._views import View
from dinov3_client.bulk.dataset import FeatureDataset
from dinov3_serving.model import Limits, OutputParity, ParityCheck, Projection
from dinov3_serving.presets import Preset

__all__ = [
    "AsyncClient",
    "Client",
    "DeadlineExceeded",
    "Dinov3Error",
    "ExtractOptions",
    "FeatureDataset",
    "Features",
    "FieldViolation",
    "Fit",
    "ImageErrors",
    "ImageFeatures",
    "ImageViews",
    "InvalidRequest",
    "InvalidResponse",
    "Layer",
    "LayerFeatures",
    "Limits",
    "MessageTooLarge",
    "MixedSizes",
    "Model",
    "ModelMismatch",
    "OutputParity",
    "Overloaded",
    "ParityCheck",
    "Pooling",
    "Preset",
    "Projection",
    "ServerError",
    "StatusError",
    "Timings",
    "Unauthenticated",
    "Unavailable",
    "View",
]

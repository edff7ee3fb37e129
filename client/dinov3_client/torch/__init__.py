"""For training with PyTorch: features for each batch of a loader, tensors, and a remote teacher.

    from dinov3_client import Client
    from dinov3_client.torch import with_features

    with Client("localhost:50051") as client:
        for batch, features in with_features(loader, client, to_request=lambda batch: batch["views"]):
            teacher = features.torch().to(device)

No other part of the client imports torch.
"""

try:
    import torch  # noqa: F401  # first, for a clear error if it is missing
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError(
        "dinov3_client.torch and Features.torch() need PyTorch, which is not installed: pip install "
        "'dinov3-serving[torch]'"
    ) from None

from dinov3_client.torch._loader import FeatureLoader, Statistics, with_features
from dinov3_client.torch._teacher import RemoteDinoV3Teacher
from dinov3_client.torch._tensors import TorchFeatures

__all__ = [
    "FeatureLoader",
    "RemoteDinoV3Teacher",
    "Statistics",
    "TorchFeatures",
    "with_features",
]

"""Distil the model of a running server into a small student, on scikit-image's photos.

    dinov3-server serve                     # no weights? --weights random:0: real speed, meaningless features
    python examples/distill.py --target localhost:50051

Each photo is read once and cropped several times with the parameters of torchvision's RandomResizedCrop and a random
horizontal flip. The student gets the crops as pixels; the server gets the file and the same numbers as views, so that
the teacher sees the same pixels. The five lines that make it distillation are marked.
"""

from __future__ import annotations

import argparse
import io
import math
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dinov3_client import Client, ImageViews, Model, View  # 1
from dinov3_client.torch import with_features  # 2

PHOTOS = [
    Path(skimage.__file__).parent / "data" / name
    for name in (
        "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
        "retina.jpg", "rocket.jpg",
    )
]  # fmt: skip


class Crops(NamedTuple):
    """V crops of one photo, or of all photos of a batch."""

    student: torch.Tensor
    """[V, 3, size, size], normalized."""
    teacher: list[ImageViews]


class Photos(Dataset[Crops]):
    """Each photo `repeats` times, with different crops each time."""

    def __init__(self, files: Sequence[Path], repeats: int, views: int, size: int, model: Model) -> None:
        self.files = [file for file in files for _ in range(repeats)]
        self.views, self.size = views, size
        self.mean = torch.tensor(model.mean).view(3, 1, 1)
        self.std = torch.tensor(model.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Crops:
        data = self.files[index].read_bytes()
        photo = Image.open(io.BytesIO(data)).convert("RGB")
        views = [
            View(crop=random_resized_crop(photo.width, photo.height), flip=random.random() < 0.5, size=self.size)
            for _ in range(self.views)
        ]
        return Crops(torch.stack([self.pixels(photo, view) for view in views]), [ImageViews(data, views)])

    def pixels(self, photo: Image.Image, view: View) -> torch.Tensor:
        """Return the pixels that the server makes of a view: cropped, then resized, then flipped."""
        assert view.crop is not None
        top, left, height, width = view.crop
        crop = photo.crop((left, top, left + width, top + height))
        crop = crop.resize((self.size, self.size), Image.Resampling.BILINEAR)
        if view.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
        return (values - self.mean) / self.std


def random_resized_crop(
    width: int, height: int, scale: tuple[float, float] = (0.3, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop.get_params does."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    # None fitted: the largest central crop with an allowed aspect ratio.
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def collate(items: Sequence[Crops]) -> Crops:
    """Join photos in order, which is also the order of the features of their views."""
    return Crops(torch.cat([item.student for item in items]), [one for item in items for one in item.teacher])


class Student(nn.Module):
    """A few convolutions with the teacher's stride: from [B, 3, H, W] to CLS [B, D] and patches [B, D, H/16, W/16]."""

    def __init__(self, dim: int, width: int = 48) -> None:
        super().__init__()
        channels = [3, width, 2 * width, 4 * width, 4 * width]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.GELU())
                for before, after in pairwise(channels)
            )
        )
        self.patches = nn.Conv2d(channels[-1], dim, 1)
        self.cls = nn.Linear(channels[-1], dim)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.stages(images)
        return self.cls(features.mean((2, 3))), self.patches(features)


def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the mean of 1 - cosine over the channels (axis 1)."""
    return 1 - F.cosine_similarity(student, teacher.float(), dim=1).mean()


def train(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    with Client(args.target) as client:  # 3
        model = client.wait_ready()
        print(f"teacher: {model.name}, {model.weights}{', RANDOM WEIGHTS' if model.random_weights else ''}")
        loader = DataLoader(
            Photos(PHOTOS, args.repeats, args.views, args.size, model),
            batch_size=args.photos,
            shuffle=True,
            collate_fn=collate,
            num_workers=args.workers,
        )
        student = Student(model.embed_dim).to(device)
        optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
        stream = with_features(loader, client, to_request=lambda batch: batch.teacher, channels_first=True)  # 4
        for epoch in range(1, args.epochs + 1):
            losses = []
            for batch, features in stream:
                teacher = features.torch().to(device)  # 5
                cls, patches = student(batch.student.to(device))
                loss = distance(cls, teacher.cls) + distance(patches, teacher.patches)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            stats = stream.stats
            print(
                f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, {stats.images_per_second:.0f} crops/s, "
                f"{stats.bytes_per_second / 1e6:.1f} MB/s of features; of {stats.seconds:.1f} s, "
                f"{stats.wait_share:.0%} waiting for features",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil the model of a running server into a small student.")
    parser.add_argument("--target", default="localhost:50051", metavar="HOST:PORT", help="(default %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="(default %(default)s)")
    parser.add_argument("--photos", type=int, default=8, help="photos in a batch (default %(default)s)")
    parser.add_argument("--views", type=int, default=4, help="crops of each photo (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=8, help="of each photo in an epoch (default %(default)s)")
    parser.add_argument(
        "--size", type=int, default=112, help="pixels of a crop, a multiple of 16 (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="DataLoader processes (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    train(args)


if __name__ == "__main__":
    main()

"""Distil the served model with DistributedDataParallel:
`torchrun --standalone --nproc-per-node 2 examples/torchrun_ddp.py FOLDER`

Each rank requests the features of its own photos; the server batches the requests of all ranks. The server is
DINOV3_TARGET (default localhost:50051). Runs on the CPU with gloo; for GPUs use nccl and `cuda:LOCAL_RANK`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dinov3_client import Client
from dinov3_client.torch import with_features

TARGET = os.environ.get("DINOV3_TARGET") or "localhost:50051"
SIZE, EPOCHS, BATCH = 224, 2, 4


class Photos(Dataset):
    """(index, pixels [SIZE, SIZE, 3] uint8), which student and teacher both get."""

    def __init__(self, folder: str) -> None:
        self.files = sorted(Path(folder).glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        photo = Image.open(self.files[index]).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return index, np.array(photo)


def student(dims: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 16, stride=16), nn.GELU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, dims)
    )


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    photos = Photos(folder)
    sampler = DistributedSampler(photos)
    loader = DataLoader(photos, BATCH, sampler=sampler)
    with Client(TARGET, deadline=600) as client:  # retries while the server is full or restarts
        model = DistributedDataParallel(student(client.wait_ready(60).embed_dim))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        stream = with_features(loader, client, to_request=lambda batch: batch[1].numpy(), outputs="cls", preset="none")
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            seen = torch.zeros(len(photos))
            for (indices, pixels), features in stream:
                teacher = features.torch().cls.float()
                loss = 1 - F.cosine_similarity(model(pixels.permute(0, 3, 1, 2) / 255), teacher).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen[indices] += 1
            dist.all_reduce(seen)
            dist.all_reduce(loss := loss.detach())
            if dist.get_rank() == 0:
                print(f"epoch {epoch}: loss {loss.item() / dist.get_world_size():.3f}, {int(seen.sum())} photos")
        check(client, photos, indices, teacher, seen)
    dist.destroy_process_group()


def check(client: Client, photos: Photos, indices: torch.Tensor, teacher: torch.Tensor, seen: torch.Tensor) -> None:
    """Every photo came once (some twice if ranks do not divide their number), and its features are its own."""
    assert (seen >= 1).all()
    assert seen.sum() < len(photos) + dist.get_world_size()
    pixels = np.stack([photos[index][1] for index in indices.tolist()])
    expected = client.extract(pixels, "cls", preset="none").torch().cls.float()
    torch.testing.assert_close(teacher, expected, rtol=1e-2, atol=1e-2)


if __name__ == "__main__":
    main(sys.argv[1])

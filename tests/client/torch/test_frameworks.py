"""RemoteDinoV3Teacher and batches of `with_features` in the frameworks that training code uses."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from dinov3_client import Client, ImageViews, View
from dinov3_client.testing import MODEL, FakeServer
from dinov3_client.torch import RemoteDinoV3Teacher, TorchFeatures, with_features
from tests.support.waiting import LIMIT

PIXELS = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (6, 3, 32, 32), np.uint8))


@pytest.fixture
def client() -> Iterator[Client]:
    with FakeServer() as server, Client(server.target, deadline=LIMIT) as client:
        yield client


class Student(nn.Module):
    def __init__(self, client: Client) -> None:
        super().__init__()
        self.teacher = RemoteDinoV3Teacher({"device": "cpu"}, client=client)
        self.net = nn.Linear(3 * 32 * 32, MODEL.embed_dim)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mine = self.net(images.flatten(1).to(self.net.weight.dtype))
        loss: torch.Tensor = (mine - self.teacher(images)["cls_token"].to(mine.dtype)).square().mean()
        return loss


def test_the_teacher_is_no_part_of_a_checkpoint(client: Client) -> None:
    student = Student(client)
    state = student.state_dict()
    assert sorted(state) == ["net.bias", "net.weight"]
    student.load_state_dict(state, strict=True)
    assert student.teacher.load_state_dict({}, strict=True) is not None
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_modes_dtypes_and_devices_of_a_module(client: Client) -> None:
    teacher = Student(client).train().requires_grad_(False).half().eval().teacher
    assert teacher(PIXELS)["cls_token"].dtype == torch.float16
    assert teacher.double()(PIXELS)["patch_tokens"].dtype == torch.float64
    assert teacher.to("meta")(PIXELS)["cls_token"].device.type == "meta"
    assert teacher.to_empty(device="cpu").float()(PIXELS)["cls_token"].dtype == torch.float32


def test_copies_pickles_and_averages_answer_alike(client: Client) -> None:
    student = Student(client)
    expected = student(PIXELS)
    averaged = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    averaged.update_parameters(student)
    averaged.update_parameters(student)
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    for each in (
        copy.deepcopy(student),
        pickle.loads(pickle.dumps(student)),
        torch.load(file, weights_only=False),
        averaged,
    ):
        torch.testing.assert_close(each(PIXELS), expected)


def test_data_parallel_is_refused_with_what_to_do(client: Client) -> None:
    with pytest.raises(RuntimeError, match=r"DataParallel cannot hold a remote teacher: .* DistributedDataParallel"):
        Student(client).teacher._replicate_for_data_parallel()


def test_distributed_wrappers_of_a_module_that_holds_the_teacher(client: Client, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        student = Student(client)
        expected = student(PIXELS)
        parallel = nn.parallel.DistributedDataParallel(student)
        loss = parallel(PIXELS)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        assert student.net.weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


@dataclass
class Crops:
    student: torch.Tensor
    teacher: list[ImageViews]


def crops(rows: list[torch.Tensor]) -> Crops:
    file = io.BytesIO()
    Image.new("RGB", (40, 40)).save(file, "PNG")
    return Crops(torch.stack(rows), [ImageViews(file.getvalue(), [View(flip=True, size=32)]) for _ in rows])


def stream(client: Client, **options: Any) -> Any:
    loader: Any = DataLoader(PIXELS, batch_size=2, collate_fn=crops, **options)  # type: ignore[arg-type]
    return with_features(loader, client, to_request=lambda batch: batch.teacher)


def test_the_samplers_of_the_loader_can_be_reached(client: Client) -> None:
    sampler: Any = DistributedSampler(PIXELS, num_replicas=2, rank=1)  # type: ignore[arg-type]
    found = stream(client, sampler=sampler)
    assert found.sampler is found.batch_sampler.sampler is sampler
    assert with_features([1], client, to_request=lambda _: b"").sampler is None


def test_features_move_as_frameworks_move_a_batch(client: Client) -> None:
    features = client.extract(PIXELS.numpy().transpose(0, 2, 3, 1).copy(), preset="none", dtype="int8")
    moved = features.to("cpu", torch.bfloat16, non_blocking=True)
    assert isinstance(moved, TorchFeatures)
    assert moved.cls.dtype == torch.bfloat16
    torch.testing.assert_close(features.to("cpu").patches, features.torch().patches)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.filterwarnings("ignore")
def test_lightning(client: Client, tmp_path: Path, precision: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student = Student(client)
            self.rows = 0

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            given, features = batch
            assert isinstance(given.teacher[0].views[0], View)
            assert isinstance(features, TorchFeatures)
            self.rows += len(features)
            loss: torch.Tensor = self.student(given.student) + 0 * features.cls.float().sum()
            self.log("loss", loss, batch_size=len(features))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-9)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, default_root_dir=tmp_path, logger=False
    )
    trainer.fit(module, stream(client))
    assert module.rows == 2 * len(PIXELS)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert sorted(state) == ["student.net.bias", "student.net.weight"]


@pytest.mark.filterwarnings("ignore")
def test_accelerate(client: Client, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    student = Student(client)
    loader = DataLoader(PIXELS, batch_size=2, collate_fn=crops)  # type: ignore[arg-type]
    student, optimizer, loader = accelerator.prepare(student, torch.optim.SGD(student.parameters(), 1e-9), loader)
    rows = 0
    for given, features in with_features(loader, client, to_request=lambda batch: batch.teacher):
        accelerator.backward(student(given.student))
        optimizer.step()
        rows += len(accelerate.utils.send_to_device(features, accelerator.device))
    assert rows == len(PIXELS)
    accelerator.save_state(tmp_path / "state")
    accelerator.load_state(tmp_path / "state")

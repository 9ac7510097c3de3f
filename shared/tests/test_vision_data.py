from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from leap_shared.errors import UserError
from leap_shared.vision import AugmentationConfig, DataConfig, build_transform, evaluate, evaluation_loader, open_source
from leap_shared.vision.data import Pictures, TrainOrder, batches, isolated, train_loader

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
LABELS = np.arange(10) // 5
CLASSES = ("cat", "dog")
PLAIN = build_transform(DataConfig("unused", image_size=12, crop_fraction=1.0))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_folder(root: Path) -> str:
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        path = root / "tree" / CLASSES[label] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(image))
    return str(root / "tree")


def write_shards(root: Path) -> str:
    for shard, part in enumerate(np.array_split(np.arange(10), 2)):
        with tarfile.open(root / f"part-{shard:03}.tar", "w") as tar:
            for index in part:
                for suffix, content in (("png", png(IMAGES[index])), ("cls", b"%d" % LABELS[index])):
                    member = tarfile.TarInfo(f"{index:02}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(root / "part-{000..001}.tar")


def write_shards_with_webdataset(root: Path) -> str:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(root / "shard-0.tar")) as writer:
        for index in range(10):
            writer.write({"__key__": f"a/{index:02}", "png": png(IMAGES[index]), "cls": int(LABELS[index])})
    return str(root / "shard-*.tar")


def write_array(root: Path) -> str:
    np.savez(root / "all.npz", images=IMAGES, labels=LABELS)
    return str(root / "all.npz")


def write_hugging_face(root: Path) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "other": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    rows = {"picture": [Image.fromarray(image) for image in IMAGES], "other": list(range(10)), "kind": LABELS.tolist()}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)}).save_to_disk(str(root / "saved"))
    return str(root / "saved")


WRITERS = [write_folder, write_shards, write_shards_with_webdataset, write_array, write_hugging_face]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_gives_the_same_pictures_in_the_same_order(write, tmp_path):
    source = open_source(write(tmp_path))
    assert len(source) == 10
    for index, (image, label) in enumerate(source):
        assert label == LABELS[index]
        np.testing.assert_array_equal(np.asarray(image), IMAGES[index])
        if index == 9:
            break


def test_a_torch_dataset_of_uint8_tensors_gives_the_same_tensors_as_a_folder(tmp_path):
    tensors = TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
    ours = [Pictures(source, PLAIN, 2, 0)[0, 3] for source in (tensors, open_source(write_folder(tmp_path)))]
    torch.testing.assert_close(ours[0], ours[1], rtol=0, atol=0)


def test_float_tensors_are_taken_as_they_are():
    source = TensorDataset(torch.rand(4, 3, 5, 5), torch.zeros(4, dtype=torch.long))
    image, _ = Pictures(source, PLAIN, 2, 0)[0, 2]
    torch.testing.assert_close(image, source.tensors[0][2], rtol=0, atol=0)


def augmented(workers: int, epoch: int = 1) -> torch.Tensor:
    augmentation = AugmentationConfig(erasing=0.5)
    transform = build_transform(DataConfig("unused", image_size=12), augmentation)
    source = TensorDataset(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), torch.from_numpy(LABELS))
    keys = [[(epoch, index) for index in range(first, first + 5)] for first in (0, 5)]
    loader = train_loader(Pictures(source, transform, 2, 7), keys, workers=workers)
    return torch.cat([images for images, _ in batches(loader)])


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_workers():
    torch.testing.assert_close(augmented(0), augmented(2), rtol=0, atol=0)


def test_augmentation_differs_between_epochs_and_leaves_the_global_generators_alone():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002 - what timm uses
    assert not torch.equal(augmented(0, epoch=1), augmented(0, epoch=2))
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002 - what timm uses
    assert torch.equal(torch.get_rng_state(), before[2])


@given(
    length=st.integers(1, 60),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    epoch=st.integers(0, 3),
)
def test_processes_and_micro_batches_split_the_same_global_batches(length, shape, epoch):
    accumulation, world, size = shape
    whole = accumulation * world * size
    if whole > length:
        with pytest.raises(UserError, match="training pictures"):
            TrainOrder(length, shape, seed=1, epoch=epoch, rank=0, start=0)
        return
    one = list(TrainOrder(length, (1, 1, whole), seed=1, epoch=epoch, rank=0, start=0))
    many = [list(TrainOrder(length, shape, seed=1, epoch=epoch, rank=rank, start=0)) for rank in range(world)]
    for update, keys in enumerate(one):
        parts = [share[update * accumulation + micro] for micro in range(accumulation) for share in many]
        assert [key for part in parts for key in part] == keys
    assert len({key for keys in one for key in keys}) == length // whole * whole


def test_an_epoch_entered_in_the_middle_goes_on_with_the_same_batches():
    options = {"seed": 3, "epoch": 2, "rank": 1}
    whole = list(TrainOrder(50, (2, 2, 3), start=0, **options))
    assert list(TrainOrder(50, (2, 2, 3), start=3, **options)) == whole[6:]
    other = list(TrainOrder(50, (2, 2, 3), start=0, **{**options, "epoch": 3}))
    assert [[index for _, index in keys] for keys in whole] != [[index for _, index in keys] for keys in other]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_corrupt_picture_is_named_by_its_path_in_one_line(workers, tmp_path):
    source = open_source(write_folder(tmp_path))
    path = tmp_path / "tree" / "dog" / "07.png"
    path.write_bytes(path.read_bytes()[:120])
    loader = evaluation_loader(source, PLAIN, batch_size=4, workers=workers)
    with pytest.raises(UserError, match=r"cannot read the picture .*dog/07\.png") as caught:
        list(batches(loader))
    assert "\n" not in str(caught.value)


def test_squash_shows_the_whole_picture_and_keep_ratio_cuts_its_sides():
    picture = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 6, 20, 0).repeat(3, 2))
    options = {"image_size": 10, "crop_fraction": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    kept = build_transform(DataConfig("unused", **options))(picture)
    squashed = build_transform(DataConfig("unused", squash=True, **options))(picture)
    assert kept.shape == squashed.shape == (3, 10, 10)
    assert kept[0, 5, 0] > 0.15 > squashed[0, 5, 0]


@pytest.mark.parametrize("policy", ["rand-m10", "rand-m10-inc1", "rand-m0", "v0", "original", "augmix-m10"])
def test_every_strength_of_every_operation_of_timms_policies_gives_a_picture(policy):
    transform = build_transform(DataConfig("unused", image_size=8), AugmentationConfig(auto_augment=policy))
    with isolated(0):
        assert all(transform(Image.fromarray(IMAGES[0])).isfinite().all() for _ in range(200))


def test_crop_padding_keeps_the_scale_of_small_pictures():
    augmentation = AugmentationConfig(crop_padding=2, auto_augment=None, erasing=0.0, flip=0.0, colour_jitter=0.0)
    data = DataConfig("unused", image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[2:6, 2:6] = 255
    image = build_transform(data, augmentation)(Image.fromarray(pixels))
    assert image.sum() == 3 * 16


class Fixed(nn.Module):
    """Gives picture i the logits that its first pixels hold."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return images.flatten(1)[:, :7]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_top1_top5_and_loss_are_right_with_a_ragged_last_batch(batch_size):
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(11, 3, 4, 4, generator=generator), torch.arange(11) % 7
    logits = images.flatten(1)[:, :7]
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    loader = evaluation_loader(TensorDataset(images, labels), PLAIN, batch_size=batch_size)
    model = Fixed().train()
    scores = evaluate(model, loader)
    assert scores == pytest.approx(
        {
            "top1": 100 * (rank == 0).float().mean().item(),
            "top5": 100 * (rank < 5).float().mean().item(),
            "loss": nn.functional.cross_entropy(logits, labels).item(),
            "images": 11,
        }
    )
    assert model.training


def test_several_outputs_are_scored_by_name():
    images, labels = torch.eye(7).repeat(1, 7)[:, :48].reshape(7, 3, 4, 4), torch.arange(7)
    loader = evaluation_loader(TensorDataset(images, labels), PLAIN, batch_size=3)
    scores = evaluate(Fixed(), loader, predict=lambda model, x: {"good": model(x), "bad": -model(x)})
    assert (scores["good/top1"], scores["bad/top1"], scores["bad/top5"]) == (100, 0, 0)


def test_pictures_and_labels_that_cannot_be_are_refused_by_name(tmp_path):
    source = TensorDataset(torch.rand(3, 3, 5, 5), torch.tensor([0, 4, -1]))
    pictures = Pictures(source, PLAIN, 3, 0)
    for index, label in ((1, "4"), (2, "-1")):
        error = pictures[0, index]
        assert isinstance(error, UserError)
        assert f"number {index} is {label}" in str(error)


def empty_folder(root: Path) -> str:
    return str(root)


def class_without_pictures(root: Path) -> str:
    (root / "cat").mkdir()
    return str(root)


def missing(root: Path) -> str:
    return str(root / "nothing")


def missing_shard(root: Path) -> str:
    write_shards(root)
    return str(root / "part-{000..002}.tar")


def compressed_shard(root: Path) -> str:
    with tarfile.open(root / "x.tar", "w:gz") as tar:
        tar.add(__file__, "a.png")
    return str(root / "x.tar")


def shard_without_label(root: Path) -> str:
    with tarfile.open(root / "x.tar", "w") as tar:
        tar.add(__file__, "a.png")
    return str(root / "x.tar")


def floats(root: Path) -> str:
    np.savez(root / "x.npz", images=IMAGES / 255, labels=LABELS)
    return str(root / "x.npz")


def fewer_labels(root: Path) -> str:
    np.savez(root / "x.npz", images=IMAGES, labels=LABELS[:4])
    return str(root / "x.npz")


def pickled(root: Path) -> str:
    np.savez(root / "x.npz", images=np.array([{}]), labels=LABELS)
    return str(root / "x.npz")


def no_archive(root: Path) -> str:
    (root / "x.npz").write_bytes(b"PK no zip file")
    return str(root / "x.npz")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (empty_folder, "no folders of classes"),
        (class_without_pictures, "cat has no pictures"),
        (missing, "no pictures at .*nothing"),
        (missing_shard, r"part-002\.tar"),
        (compressed_shard, "uncompressed"),
        (shard_without_label, r"\.cls label.*a"),
        (floats, "float64 .*expected uint8"),
        (fewer_labels, "expected 10"),
        (pickled, "cannot read"),
        (no_archive, "cannot read"),
    ],
)
def test_a_source_without_usable_pictures_is_refused_with_the_reason(make, words, tmp_path):
    with pytest.raises(UserError, match=words):
        open_source(make(tmp_path))


def test_a_hugging_face_data_set_without_such_a_split_is_refused(tmp_path):
    with pytest.raises(UserError, match="split 'test'"):
        open_source(write_hugging_face(tmp_path), "test")


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (DataConfig, {"train": ""}, "train=''"),
        (DataConfig, {"train": "x", "crop_fraction": 1.5}, "crop_fraction=1.5"),
        (AugmentationConfig, {"erasing": 1.2}, "erasing=1.2: expected a probability"),
        (AugmentationConfig, {"scale": (1.0, 0.5)}, "scale="),
    ],
)
def test_a_setting_out_of_range_is_named(kind, fields, words):
    with pytest.raises(UserError, match=words):
        kind(**fields)


def test_an_unknown_augmentation_policy_is_refused():
    with pytest.raises(UserError, match="auto_augment='rand-q9'"):
        build_transform(DataConfig("unused"), AugmentationConfig(auto_augment="rand-q9"))

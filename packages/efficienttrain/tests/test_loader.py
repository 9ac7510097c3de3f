"""The loader: one pool of workers for all stages, the same bits from anywhere, shares of processes, replay."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.loader import CurriculumLoader
from leap_efficienttrain.pipelines import photographs
from leap_efficienttrain.plan import State
from leap_efficienttrain.stages import Stage
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.config import AugmentationConfig

COUNT, BASE = 24, 32
PLAIN = AugmentationConfig(auto_augment=None, colour_jitter=0, erasing=0)


class Noise:
    """Pictures that say their number in their first pixel, with it as the label."""

    def __init__(self, count: int = COUNT, where: bool = False) -> None:
        generator = np.random.default_rng(0)
        self.images = generator.integers(0, 255, (count, 40, 48, 3), dtype=np.uint8)
        if where:
            self.where = "file_{}.jpg".format

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index], index


class Pids(Noise):
    """Says which process reads it, in the label."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        import os

        return self.images[index], os.getpid()


class Broken(Noise):
    """One of its pictures is none."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return (b"no picture" if index == 5 else self.images[index]), index


def states(*stages: Stage, batch: int = 4, world: int = 1, samples: int = COUNT, **changes: Any) -> list[State]:
    curriculum = Curriculum(stages, len(stages), BASE, unit="epochs", batch=batch, **changes)
    return list(curriculum.epochs(samples, world))


SIZES = (Stage(0.5, 16, 2), Stage(0.5, BASE, 9))
REPLAY = (Stage(0.5, 16, 2, replay=3, buffer=4), Stage(0.5, BASE, 9))


def loader(source: Any = None, **options: Any) -> CurriculumLoader:
    transform = options.pop("transform", None) or LiveTransform(BASE)
    return CurriculumLoader(source or Noise(), transform, **options)


def passes(loader: CurriculumLoader, states: list[State], start: int = 0) -> list[list[tuple[Tensor, Tensor]]]:
    result = []
    for number, state in enumerate(states):
        loader.set_state(state, start if number == 0 else 0)
        result.append(list(loader))
    return result


def same(left: Any, right: Any) -> bool:
    pairs = list(zip(left, right, strict=True))
    return bool(pairs) and all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_batches_have_the_states_size_number_and_type() -> None:
    source = loader(dtype=torch.bfloat16)
    for state in states(*SIZES):
        source.set_state(state)
        assert len(source) == 6
        for images, labels in source:
            assert images.shape == (4, 3, state.size, state.size)
            assert (images.dtype, labels.dtype) == (torch.bfloat16, torch.int64)


def test_a_pass_shows_every_picture_once_and_the_next_one_in_another_order() -> None:
    source = loader()
    seen = [torch.cat([labels for _, labels in batches]).tolist() for batches in passes(source, states(*SIZES))]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(COUNT))
    assert seen[0] != seen[1]


def test_a_part_of_a_pass_has_the_updates_of_its_state() -> None:
    halves = states(Stage(0.75, 16), Stage(0.25, BASE), arithmetic="continuous")
    source = loader()
    lengths = [len(batches) for batches in passes(source, halves)]
    assert lengths == [state.steps for state in halves]
    assert sum(lengths) == 12


@pytest.mark.parametrize("downsample", ["lanczos", "fourier", "area", "bicubic"])
def test_all_ways_of_becoming_smaller_give_the_size(downsample: Any) -> None:
    source = loader(transform=LiveTransform(BASE, downsample=downsample))
    source.set_state(states(*SIZES)[0])
    assert next(iter(source))[0].shape == (4, 3, 16, 16)


def test_lanczos_in_the_batch_has_the_bits_of_lanczos_in_the_workers() -> None:
    pair = [loader(transform=LiveTransform(BASE, downsample_in=where)) for where in ("worker", "batch")]  # type: ignore[arg-type]
    results = [passes(source, states(*SIZES))[0] for source in pair]
    assert all(torch.allclose(a[0], b[0], atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_one_pool_of_workers_serves_all_states(context: str) -> None:
    workers = 2 if context == "fork" else 1
    source = loader(Pids(), workers=workers, context=context)
    pids, sizes = [], []
    for batches in passes(source, states(*SIZES)):
        pids.append({pid for _, labels in batches for pid in labels.tolist()})
        sizes.append({tuple(images.shape[2:]) for images, _ in batches})
    assert pids[0] == pids[1]
    assert len(pids[0]) == workers
    assert sizes == [{(16, 16)}, {(32, 32)}]


def test_workers_prepare_nothing_for_a_state_that_was_left() -> None:
    source = loader(workers=2)
    first, second = states(*SIZES)
    source.set_state(first)
    next(iter(source))  # and all that the workers have prepared beside it
    source.set_state(second)
    fresh = loader()
    fresh.set_state(second)
    assert same(list(source), list(fresh))


def test_any_number_of_workers_gives_the_same_bits() -> None:
    alone, helped = (passes(loader(workers=workers), states(*SIZES)) for workers in (0, 2))
    assert same(itertools.chain(*alone), itertools.chain(*helped))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [1, 4])
def test_a_pass_goes_on_from_any_update_to_the_same_bits(start: int, workers: int) -> None:
    wanted = states(*SIZES)
    whole = passes(loader(), wanted)
    rest = passes(loader(workers=workers), wanted, start)
    assert same(rest[0], whole[0][start:])
    assert same(rest[1], whole[1])


def test_accumulation_goes_on_in_updates() -> None:
    wanted = states(*SIZES, micro_batch=2)
    whole = passes(loader(), wanted)
    assert len(whole[0]) == 12
    assert same(passes(loader(), wanted, 2)[0], whole[0][4:])


def test_global_random_numbers_stay_where_they_are() -> None:
    source = loader()
    source.set_state(states(*SIZES)[0])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    batches = iter(source)
    next(batches)
    assert torch.equal(torch.rand(1), expected)


def test_processes_share_an_update_and_together_make_the_batches_of_one() -> None:
    alone = passes(loader(), states(*SIZES))
    shares = [passes(loader(rank=rank, world=2), states(*SIZES, world=2)) for rank in range(2)]
    for whole, left, right in zip(alone[0], shares[0][0], shares[1][0], strict=True):
        assert torch.equal(torch.cat([left[1], right[1]]), whole[1])
        assert set(left[1].tolist()).isdisjoint(right[1].tolist())


def test_pictures_are_the_same_under_any_number_of_processes() -> None:
    def make(**options: Any) -> CurriculumLoader:
        return loader(transform=LiveTransform(BASE, augmentation=AugmentationConfig(erasing=0)), **options)

    whole = passes(make(), states(*SIZES))[0]
    shares = [passes(make(rank=rank, world=2), states(*SIZES, world=2))[0] for rank in range(2)]
    assert all(
        torch.equal(torch.cat([left[0], right[0]]), batch[0]) for batch, left, right in zip(whole, *shares, strict=True)
    )


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_replayed_pictures_are_fresh_ones_of_the_stage(dtype: Any) -> None:
    source = loader(replay_dtype=dtype, split=2)
    seen: set[int] = set()
    for images, labels in passes(source, states(*REPLAY, batch=12)[:1])[0]:
        seen |= set(labels[:4].tolist())
        assert images.shape == (12, 3, 16, 16)
        assert set(labels.tolist()) <= seen


def test_half_precision_replay_repeats_erased_pictures_and_bytes_are_erased_anew() -> None:
    def repeats(dtype: Any) -> Iterator[bool]:
        transform = LiveTransform(BASE, augmentation=AugmentationConfig(auto_augment=None, colour_jitter=0, erasing=1))
        source = loader(transform=transform, replay_dtype=dtype, split=4)
        (batches,) = passes(source, states(*REPLAY, batch=12)[:1])
        for images, labels in batches[:1]:
            for place in range(4, 12):
                (fresh,) = (labels[:4] == labels[place]).nonzero()
                yield torch.equal(images[place], images[fresh[0]])

    assert not any(repeats("uint8"))
    images_repeat = list(repeats("float16"))
    assert any(images_repeat)


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("workers", [0, 1])
def test_replay_goes_on_to_the_same_bits_once_the_state_is_loaded(dtype: Any, workers: int) -> None:
    wanted = states(*REPLAY, batch=12)
    options = {"replay_dtype": dtype, "split": 2}
    whole = passes(loader(**options), wanted)
    stopped = loader(**options)
    stopped.set_state(wanted[0])
    batches = iter(stopped)
    for _ in range(5):
        next(batches)
    saved = stopped.state_dict()
    other = loader(workers=workers, **options)
    other.load_state_dict(saved)
    rest = passes(other, wanted, 5)
    assert same(rest[0], whole[0][5:])
    assert same(rest[1], whole[1])


def test_replay_over_two_passes_of_a_stage_is_restored_too() -> None:
    wanted = list(Curriculum((Stage(1, BASE, 2, replay=2, buffer=9),), 4, BASE, batch=8).epochs(COUNT))
    assert [state.stage for state in wanted[:2]] == [0, 0]
    whole = passes(loader(split=2), wanted[:2])
    stopped = loader(split=2)
    passes(stopped, wanted[:1])
    stopped.set_state(wanted[1])
    next(iter(stopped))
    other = loader(split=2)
    other.load_state_dict(stopped.state_dict())
    assert same(passes(other, wanted[1:2], 1)[0], whole[1][1:])


def test_the_state_of_the_loader_names_batches_and_holds_no_pictures() -> None:
    source = loader(split=2)
    passes(source, states(*REPLAY, batch=12)[:1])
    assert source.state_dict() == {"stage": 0, "batches": [[0, 2], [0, 3], [0, 4], [0, 5]]}


def test_a_stage_begins_with_an_empty_buffer() -> None:
    source = loader(split=2)
    wanted = states(*(Stage(0.5, BASE, magnitude, replay=2, buffer=9) for magnitude in (2, 5)), batch=8)
    passes(source, wanted[:1])
    source.set_state(wanted[1])
    assert len(source.replay) == 0
    (labels, *_) = (labels for _, labels in source)
    assert set(labels[4:].tolist()) <= set(labels[:4].tolist())


def test_a_batch_that_the_chunks_do_not_divide_is_refused_before_anything_is_decoded() -> None:
    with pytest.raises(UserError, match="a batch of 4 pictures cannot be split into 32 chunks: set split to a divisor"):
        loader().set_state(states(*REPLAY, batch=12)[0])


def test_ragged_replay_keeps_chunks_that_are_not_even() -> None:
    source = loader(split=3, ragged="keep")
    source.set_state(states(*REPLAY, batch=12)[0])
    assert {len(labels) for _, labels in source} != {12}


def test_replay_with_accumulation_is_refused() -> None:
    state = states(*REPLAY, batch=12)[0]
    state = dataclasses.replace(state, leg=dataclasses.replace(state.leg, micro_batch=2, accumulate=2))
    with pytest.raises(UserError, match="replay with 2 forward passes per update"):
        loader(split=2).set_state(state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(workers: int) -> None:
    source = loader(Broken(where=True), workers=workers)
    source.set_state(states(*SIZES)[0])
    with pytest.raises(UserError, match=r"cannot read the picture file_5\.jpg: .*: mend it or remove it"):
        list(source)


def test_labels_of_no_class_are_named() -> None:
    source = loader(num_classes=20)
    source.set_state(states(*SIZES)[0])
    with pytest.raises(UserError, match=r"the label of number \d+ is 2\d, of 20 classes"):
        list(source)


def test_iterating_without_a_state_is_refused() -> None:
    with pytest.raises(UserError, match=r"call set_state\(\)"):
        iter(loader())


@pytest.mark.parametrize(
    ("options", "said"),
    [({"rank": 2, "world": 2}, "rank 2 of world 2"), ({"transform": LiveTransform(output="float")}, "output is float")],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loader(**options)


def test_states_that_do_not_fit_are_refused() -> None:
    source = loader()
    with pytest.raises(UserError, match="the state is one of 2 processes"):
        source.set_state(states(*SIZES, world=2)[0])
    with pytest.raises(UserError, match=r"start 7: the pass has 6 updates"):
        source.set_state(states(*SIZES)[0], start=7)
    with pytest.raises(UserError, match=r"the state has 12 updates, and the 24 pictures fill 6: give samples=24"):
        source.set_state(states(*SIZES, samples=48)[0])


def test_states_without_a_size_of_the_data_go_through_all_of_it() -> None:
    source = loader()
    curriculum = Curriculum(SIZES, 2, BASE, unit="epochs", batch=4)
    source.set_state(next(curriculum.epochs()))
    assert len(list(source)) == 6


def test_sources_of_float_tensors_are_cropped_in_frequency_and_otherwise_refused() -> None:
    class Floats(Noise):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return torch.from_numpy(self.images[index, :BASE, :BASE]).permute(2, 0, 1) / 255, index

    source = loader(Floats(), transform=LiveTransform(BASE, downsample="fourier", augmentation=PLAIN))
    source.set_state(states(*SIZES)[0])
    assert next(iter(source))[0].shape == (4, 3, 16, 16)
    other = loader(Floats())
    other.set_state(states(*SIZES)[0])
    with pytest.raises(UserError, match="give uint8 pictures, or take downsample='fourier'"):
        next(iter(other))


def test_it_says_how_fast_it_is() -> None:
    source = loader()
    assert source.images_per_second == 0
    passes(source, states(*SIZES))
    assert source.images_per_second > 0


def test_jpeg_files_are_read_from_a_folder(tmp_path: Any) -> None:
    from leap_shared.vision import open_source

    for number, file in enumerate(photographs(8)):
        folder = tmp_path / f"class_{number % 2}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(file)
    source = loader(open_source(str(tmp_path)), transform=LiveTransform(BASE, augment_at="low"), workers=1)
    source.set_state(states(*SIZES, samples=8)[0])
    assert sorted(torch.cat([labels for _, labels in source]).tolist()) == [0] * 4 + [1] * 4


@pytest.mark.gpu
def test_batches_of_a_gpu_have_the_numbers_of_a_cpu() -> None:
    transform = LiveTransform(BASE, augmentation=AugmentationConfig(erasing=0))
    results = [
        passes(loader(transform=transform, device=device, split=2), states(*REPLAY, batch=12))
        for device in ("cpu", "cuda")
    ]
    for mine, theirs in zip(itertools.chain(*results[0]), itertools.chain(*results[1]), strict=True):
        assert torch.equal(mine[1], theirs[1].cpu())
        torch.testing.assert_close(mine[0], theirs[0].cpu(), atol=1e-5, rtol=0)

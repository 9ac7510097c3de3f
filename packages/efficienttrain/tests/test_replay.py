"""The replay buffer: the authors' stream, memory, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leap_efficienttrain import replay
from leap_efficienttrain.replay import ReplayBuffer
from leap_shared.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
CASES = [case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"] if "replay_times" in case]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["case"])
def test_the_stream_is_the_authors(case):
    torch.manual_seed(case["seed"])
    buffer = ReplayBuffer(case["buffer_size"], case["split_factor"], case["replay_times"], dtype=None)
    size, count = case["batch"], case["batches_per_epoch"] * case["epochs"]
    stream = [buffer(torch.arange(number * size, (number + 1) * size)).tolist() for number in range(count)]
    assert stream == json.loads((GOLDEN / case["file"]).read_text())["batches"]


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 13), split=st.integers(1, 6), capacity=st.integers(1, 4), times=st.integers(1, 4))
def test_every_drawn_chunk_is_a_whole_chunk_of_a_batch_that_is_held(size, split, capacity, times):
    buffer = ReplayBuffer(capacity, split, times, dtype=None, ragged="keep", generator=generator())
    for number in range(6):
        ids = torch.arange(number * size, (number + 1) * size)
        out = buffer(ids)
        assert torch.equal(out[:size], ids)
        oldest = max(0, number + 1 - capacity) * size
        held = [
            tuple(c.tolist())
            for b in torch.arange(oldest, (number + 1) * size).split(size)
            for c in b.tensor_split(split)
        ]
        rest = out[size:].tolist()
        chunks = {chunk[0]: chunk for chunk in held if chunk}
        while rest:
            chunk = chunks[rest[0]]
            assert tuple(rest[: len(chunk)]) == chunk
            rest = rest[len(chunk) :]


def test_even_batches_are_always_times_as_large():
    buffer = ReplayBuffer(3, 4, 3, generator=generator())
    for _ in range(5):
        images, labels = buffer((torch.zeros(8, 2, 2, 3, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)))
        assert len(images) == len(labels) == 24


def test_pictures_keep_their_labels():
    buffer = ReplayBuffer(4, 4, 4, generator=generator())
    for number in range(6):
        ids = torch.arange(number * 8, number * 8 + 8)
        images, labels = buffer((ids.to(torch.uint8).view(8, 1, 1, 1), ids))
        assert torch.equal(images.flatten().long(), labels)


def test_once_passes_batches_on_and_keeps_nothing():
    buffer, batch = ReplayBuffer(times=1), torch.zeros(7, 2)
    assert buffer(batch) is batch
    assert len(buffer) == 0


def test_halves_round_fresh_pictures_too_and_come_back_in_float32():
    picture = torch.full((4, 1), 1 + 2**-12)
    out = ReplayBuffer(2, 2, 2, "float16", generator=generator())(picture)
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.ones(8, 1))


def test_a_buffer_goes_on_where_another_stood():
    first, second = (ReplayBuffer(3, 2, 3, dtype=None, generator=generator(seed)) for seed in (1, 2))
    batches = torch.arange(48).split(8)
    for batch in batches[:4]:
        first(batch)
    second.load_state_dict(first.state_dict())
    assert len(second) == 3
    for batch in batches[4:]:
        assert torch.equal(first(batch), second(batch))


def test_a_buffer_larger_than_memory_is_refused_with_its_gigabytes(monkeypatch):
    monkeypatch.setattr(replay, "free_bytes", lambda: 10_000_000)
    buffer = ReplayBuffer(1920, 4, 2)
    with pytest.raises(UserError, match=r"1920 batches takes 0\.0 GB|takes \d+\.\d GB, and 0\.0 GB are free"):
        buffer(torch.zeros(8, 64, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([torch.zeros(6, 2, dtype=torch.uint8)], "cannot be split into 4 chunks"),
        ([torch.zeros(8, 2)], "before normalisation"),
        ([torch.zeros(8, 2, dtype=torch.uint8), torch.zeros(8, 3, dtype=torch.uint8)], r"call clear\(\)"),
        ([(torch.zeros(8, 2, dtype=torch.uint8), torch.zeros(4))], "expected as many"),
        ([torch.zeros(0, 2, dtype=torch.uint8)], "expected as many"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batches, text):
    buffer = ReplayBuffer(2, 4, 2)
    *before, last = batches
    for batch in before:
        buffer(batch)
    with pytest.raises(UserError, match=text):
        buffer(last)


@pytest.mark.parametrize("numbers", [{"capacity_batches": 0}, {"split": 0}, {"times": 0}])
def test_impossible_numbers_are_refused(numbers):
    with pytest.raises(UserError, match="expected a whole number, 1 or more"):
        ReplayBuffer(**numbers)


def test_free_memory_is_known_here():
    assert replay.free_bytes() is None or replay.free_bytes() > 0

"""The benchmark: every part runs, on small sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leap_efficienttrain import benchmark, peers
from leap_efficienttrain.resampling import low_frequency_crop
from leap_shared.cli import Context
from leap_shared.errors import UserError


def context(folder: Path) -> Context:
    return Context("cpu", 0, folder, lambda _: None)


@pytest.mark.slow
def test_every_part_is_measured_beside_its_peers(tmp_path: Path) -> None:
    rows = benchmark.run(benchmark.Settings.quick(), context(tmp_path))
    assert {row["peer"] for row in rows} >= {benchmark.REFERENCE, benchmark.BICUBIC, benchmark.PILLOW, benchmark.FLOOR}
    assert all(row["ours_ms"] > 0 and row["target"] is None for row in rows)
    for part in benchmark.PARTS:
        assert (tmp_path / f"{part}.md").exists()


def test_targets_are_those_of_the_real_sizes(tmp_path: Path) -> None:
    settings = benchmark.Settings(crops=(benchmark.Crop(1, 32, {24: 3.0}),))
    forward, both = benchmark.PARTS["crop"](settings, context(tmp_path))
    assert forward.target == {benchmark.REFERENCE: 3.0}
    assert both.target == {benchmark.REFERENCE: 1.0}


def test_contenders_compute_the_same_crop(tmp_path: Path) -> None:
    settings = benchmark.Settings(crops=(benchmark.Crop(2, 32, {24: 3.0}),))
    forward, _ = benchmark.PARTS["crop"](settings, context(tmp_path))
    ours, reference = forward.ours(), forward.peers[benchmark.REFERENCE]()
    assert torch.allclose(ours, reference, atol=1e-5)


def test_one_call_prepares_what_single_steps_do(tmp_path: Path) -> None:
    settings = benchmark.Settings(sizes=(24, 32), pictures=2)
    for case in benchmark.PARTS["lanczos"](settings, context(tmp_path)):
        if "step by step" in case.peers:
            assert torch.allclose(case.ours(), case.peers["step by step"](), atol=1e-5)


def test_a_missing_peer_is_said_to_be_missing() -> None:
    x = torch.zeros(1, 3, 8, 8)
    if not peers.has_composer():
        with pytest.raises(UserError, match="pip install mosaicml"):
            peers.composer_resize(x, 4)
    assert peers.reference_crop(x, 4).shape == low_frequency_crop(x, 4).shape


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parts": ("crops",)}, "part 'crops' is unknown"),
        ({"rounds": 1}, "2 or more"),
        ({"threads": ()}, "threads none"),
    ],
)
def test_impossible_settings_are_refused(options: dict, text: str) -> None:
    with pytest.raises(UserError, match=text):
        benchmark.Settings(**options)

"""A picture file as a model's input, and figures with a title."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from leap_shared.errors import UserError
from leap_shared.vision.pictures import INK, WARNING, load_picture, new_figure, save_figure, to_input


@pytest.mark.parametrize(("height", "width"), [(32, 16), (16, 32), (1, 5)])
def test_a_picture_has_the_size_that_is_asked_for(tmp_path: Path, height: int, width: int) -> None:
    Image.new("RGB", (70, 50), (200, 100, 50)).save(tmp_path / "picture.png")
    picture = load_picture(tmp_path / "picture.png", (height, width))
    assert (picture.mode, picture.size) == ("RGB", (width, height))


def test_a_picture_is_turned_by_its_tag_and_cut_at_its_longer_sides(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # red on the left; turned clockwise, above
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    seen = np.asarray(load_picture(tmp_path / "turned.png", (16, 16)))
    assert (seen[1, :, 0].min(), seen[14, :, 0].max()) == (255, 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (9, 7), (200, 100, 50)).convert(mode).save(path)
    assert load_picture(path, (4, 4)).mode == "RGB"


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_an_input_is_normalised_channel_by_channel(colour: tuple[int, int, int]) -> None:
    image = to_input(Image.new("RGB", (3, 2), colour))
    assert image.shape == (1, 3, 2, 3)
    mean, deviation = torch.tensor(IMAGENET_DEFAULT_MEAN), torch.tensor(IMAGENET_DEFAULT_STD)
    expected = (torch.tensor(colour) / 255 - mean) / deviation
    torch.testing.assert_close(image, expected.view(1, 3, 1, 1).expand(1, 3, 2, 3))


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read the picture .*picture\.png.*Give a \.jpg, \.png"):
        load_picture(tmp_path / "picture.png", (4, 4))


@pytest.mark.parametrize(("warning", "colour"), [("", INK), ("random weights", WARNING)])
def test_a_warning_stands_below_the_title_in_red(tmp_path: Path, warning: str, colour: str) -> None:
    figure = new_figure(2, 1.5, "title", warning)
    title = figure._suptitle
    assert (title.get_text(), title.get_color()) == (f"title\n{warning}" if warning else "title", colour)
    save_figure(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.size == (300, 225)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"]


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install \"leap-shared\[report\]\""):
        new_figure(2, 1, "title")

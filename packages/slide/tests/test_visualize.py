"""Shares and effective kernels against the layers themselves, and what the verb writes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import FAMILIES, images, model
from torch import Tensor, nn

import leap_slide as ls
from leap_shared.cli import App
from leap_shared.errors import UserError
from leap_slide import visualize
from leap_slide.checkpoints import create_model, save_safetensors
from leap_slide.convert import reparameterize
from leap_slide.functional import slide_attention_conv
from leap_slide.verbs.pictures import Visualize
from leap_slide.visualize import attention_of, local_attention

DIM, HEADS = 12, 2
ROUNDING = 1e-10  # float64; the layer sums in another order


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options: Any) -> ls.SlideAttention:
    """In float64, with every parameter random: of a fixed path too, as a file may bring it."""
    made = ls.SlideAttention(DIM, HEADS, **options).double().eval()
    for number, parameter in enumerate(made.parameters()):
        parameter.data = noise(*parameter.shape, seed=number) * 0.5
    return made


def before_projection(made: ls.SlideAttention, x: Tensor, hw: tuple[int, int]) -> Tensor:
    """What the layer gives to `proj` for the first item: (heads, dim, height, width)."""
    found: list[Tensor] = []
    handle = made.proj.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    made(x, hw)
    handle.remove()
    return found[0][0].detach().T.reshape(HEADS, -1, *hw)


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "kernel_size": st.sampled_from([1, 3, 5]),
        "dim_reduction": st.just(2),
        "share_qkv": st.just(True),
        "share_kernel": st.just(False),
        "rel_pos_bias": st.just(False),
        "rpb_on": st.just("logits"),
        "padding_mode": st.sampled_from(["replicate", "zeros"]),
        "qk_scale": st.just(0.7),
        "backend": st.just("conv"),
    },
)


@given(st.integers(1, 5), st.integers(1, 5), OPTIONS, st.booleans())
@settings(max_examples=30)
def test_the_weights_give_the_slots_of_the_values_that_the_layer_projects(
    height: int, width: int, options: dict[str, Any], merged: bool
) -> None:
    hw, made = (height, width), layer(**options)
    x = noise(1, height * width, DIM)
    wanted = before_projection(made, x, hw)
    (weight, bias), of_values = made.kernels()
    weight, bias = of_values or (weight, bias)
    if merged:
        made.reparameterize()
    found = attention_of(made, x, hw)
    around = nn.functional.pad(
        made.projected(x, hw)[2][0],
        (made.kernel_size // 2,) * 4,
        "constant" if made.padding_mode == "zeros" else made.padding_mode,
    )
    slots = nn.functional.conv2d(around, weight, bias, groups=made.head_dim).unflatten(1, (made.head_dim, -1))
    mixed = (found.weights[:, None] * slots).sum(2)
    torch.testing.assert_close(mixed, wanted, atol=ROUNDING, rtol=ROUNDING)
    torch.testing.assert_close(found.weights.sum(1), torch.ones_like(found.weights[:, 0]))


@given(st.integers(3, 6), st.integers(3, 6), st.sampled_from([3, 5]), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_kernel_gives_the_output_from_the_values_around_a_pixel(
    height: int, width: int, side: int, share_kernel: bool, masked: bool
) -> None:
    hw, made = (height, width), layer(kernel_size=side, share_kernel=share_kernel, mask_padding=masked)
    for path in (made.dep_conv, made.dep_conv1, *([] if share_kernel else [made.dep_conv2])):
        path.bias.data.zero_()
        path.weight.data = path.weight[: side * side].repeat(made.head_dim, 1, 1, 1)  # a kernel for all channels
    x = noise(1, height * width, DIM)
    found, value = attention_of(made, x, hw), made.projected(x, hw)[2][0]
    around = nn.functional.unfold(value, side, padding=side // 2).reshape(HEADS, -1, side, side, *hw)
    mixed = (found.kernel[:, None] * around).sum((2, 3))
    torch.testing.assert_close(mixed, before_projection(made, x, hw), atol=ROUNDING, rtol=ROUNDING)


def test_shares_are_those_of_the_convolutions() -> None:
    made, hw = layer(share_kernel=False), (4, 5)
    x = noise(1, 20, DIM)
    query, key, _ = made.projected(x, hw)
    keys, _ = made.kernels()
    position = made.relative_position_bias_table.reshape(HEADS, -1)
    side, dim = 3, made.head_dim
    found = attention_of(made, x, hw).weights
    for slot in range(side * side):  # values that are 1 in one slot and 0 in the others
        one = torch.zeros(dim, side * side, dtype=torch.float64)
        one[:, slot] = 1
        values = (torch.zeros(dim * side * side, 1, side, side, dtype=torch.float64), one.flatten())
        share = slide_attention_conv(query, key, key, keys, values, position, None, made.scale)
        torch.testing.assert_close(found[:, slot], share[0, :, 0], atol=ROUNDING, rtol=ROUNDING)


def test_two_paths_and_one_look_at_the_same() -> None:
    network, x = model("pvt").double(), images().double()
    merged = reparameterize(copy.deepcopy(network))
    for block in (0, 1):
        two, one = (local_attention(which, x, block) for which in (network, merged))
        torch.testing.assert_close(one.weights, two.weights, atol=ROUNDING, rtol=ROUNDING)
        torch.testing.assert_close(one.kernel, two.kernel, atol=ROUNDING, rtol=ROUNDING)


def uniform(side: int = 3) -> ls.SlideAttention:
    """A layer of plain shifts whose queries are 0, so that all shares are the same."""
    made = ls.SlideAttention(DIM, HEADS, side).double().eval()
    for parameter in (made.qkv.weight, made.qkv.bias, made.dep_conv1.weight):
        parameter.data.zero_()
    return made


def test_no_preference_is_an_entropy_of_1_and_no_offset() -> None:
    found = attention_of(uniform(), noise(1, 20, DIM), (4, 5))
    torch.testing.assert_close(found.entropy, torch.ones(HEADS, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(found.mean_kernel, torch.full((HEADS, 3, 3), 1 / 9, dtype=torch.float64))
    assert found.offset.abs().max() < ROUNDING


@pytest.mark.parametrize(("slot", "offset"), [(0, (-1, -1)), (1, (-1, 0)), (5, (0, 1)), (7, (1, 0))])
def test_a_preferred_slot_is_where_the_offset_leads(slot: int, offset: tuple[int, int]) -> None:
    made = uniform()
    made.rpb_on = "logits"
    made.relative_position_bias_table.data.zero_()[0, 1, 0, slot] = 50
    found = attention_of(made, noise(1, 20, DIM), (4, 5))
    wanted = torch.tensor(offset, dtype=torch.float64)[:, None, None].expand(2, 4, 5)
    torch.testing.assert_close(found.offset[1], wanted)
    assert found.entropy[1].max() < 1e-6
    assert found.entropy[0].min() > 1 - 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_number_and_by_name_in_every_family(family: str) -> None:
    network, x = model(family, (32, 64)), images((32, 64))
    assert list(visualize.slide_blocks(network)) == ["0.0", "1.0"]
    for number, name in enumerate(("0.0", "1.0")):
        one, other = local_attention(network, x, number), local_attention(network, x, name)
        assert (one.block, other.block) == (name, name)
        assert torch.equal(one.weights, other.weights)
        assert one.weights.shape == (one.kernel.shape[0], 9, 8 >> number, 16 >> number)
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_a_layer_in_another_model_is_found_by_its_name_in_either_layout() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.maps = layer(), layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.tokens(self.maps(x).flatten(2).transpose(1, 2), hw=(4, 5))

    network, x = Own(), noise(1, DIM, 4, 5)
    found = local_attention(network, x, "maps")
    wanted = attention_of(network.maps, x.flatten(2).transpose(1, 2), (4, 5))
    torch.testing.assert_close(found.weights, wanted.weights, atol=ROUNDING, rtol=ROUNDING)
    assert local_attention(network, x, 0).hw == local_attention(network, x, "tokens").hw == (4, 5)


def test_an_item_is_one_of_the_batch() -> None:
    network, x = model("pvt"), images(batch=3)
    found, wanted = local_attention(network, x, item=2), local_attention(network, x[2:])
    torch.testing.assert_close(found.weights, wanted.weights)


def test_half_precision_is_computed_in_single() -> None:
    found = attention_of(layer().half(), noise(1, 20, DIM).half(), (4, 5))
    assert found.weights.dtype == found.kernel.dtype == torch.float32


def spoilt() -> ls.SlideAttention:
    made = layer()
    made.dep_conv1.weight.data[0] = math.nan
    return made


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: local_attention(model("pvt"), images(), 2), "slide attention is in 0.0, 1.0, or by number 0 to 1"),
        (lambda: local_attention(model("pvt"), images(), -1), "block -1 (a number, or STAGE.BLOCK) is none"),
        (lambda: local_attention(model("swin"), images(), "2.0"), "block '2.0' (a number, or STAGE.BLOCK) is none"),
        (lambda: local_attention(model("pvt", num_slide_stages=0), images()), "none has"),
        (lambda: local_attention(model("pvt"), images(), item=2), "item 2: the batch has 2, expected 0 to 1"),
        (lambda: attention_of(layer(), noise(1, 20, DIM) * math.nan, (4, 5)), "NaN or infinity"),
        (lambda: attention_of(spoilt(), noise(1, 20, DIM), (4, 5)), "the attention is not finite"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError) as refused:
        call()
    assert words in str(refused.value)


@pytest.mark.parametrize(("heads", "side"), [(1, 3), (9, 5)])
def test_a_figure_has_a_row_for_every_head_it_has_room_for(tmp_path: Path, heads: int, side: int) -> None:
    made = ls.SlideAttention(4 * heads, heads, side)
    found = attention_of(made, torch.randn(1, 6, 4 * heads), (2, 3))
    visualize.draw_local_attention(tmp_path / "a.png", Image.new("RGB", (30, 20)), found, [(0, 0), (1, 2)], "title")
    with Image.open(tmp_path / "a.png") as picture:
        rows = min(heads, visualize.MOST_HEADS)
        assert picture.height == round(150 * (max(1.6 * rows, 3.4) + 1.2))
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        App("leap-slide", "leap_slide", (Visualize,)).main(("visualize", *arguments))
    return int(stopped.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


ARGUMENTS = ("slide_pvt_tiny", "photo.png", "--device", "cpu")


def test_the_picture_and_its_numbers_are_written_and_random_weights_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size, queries = ("--img-size", "32", "64"), ("--query", "0,0", "31,63")
    assert call(*ARGUMENTS, "--block", "1.1", *size, *queries, "--out", "o", "--json") == 0
    told, facts = capsys.readouterr(), json.loads((here / "o/local_attention.json").read_text())
    assert json.loads(told.out) == {key: value for key, value in facts.items() if key != "mean_kernel"}
    assert (facts["block"], facts["map"], facts["query_tokens"]) == ("1.1", [4, 8], ["0,0", "3,7"])
    assert np.shape(facts["mean_kernel"]) == (facts["heads"], 3, 3)
    assert facts["weights"] == "random"
    assert "random" in told.err
    assert sorted(path.name for path in (here / "o").iterdir()) == [
        "config.yaml",
        "local_attention.json",
        "local_attention.png",
    ]


def test_weights_of_a_file_are_drawn_without_a_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors(create_model("slide_pvt_tiny"), here / "w.safetensors")
    assert call(*ARGUMENTS, "--img-size", "32", "--checkpoint", "w.safetensors", "--out", "o", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["weights"] == "w.safetensors"
    assert "random" not in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("slide_pvt_tini", "photo.png"), "did you mean slide_pvt_tiny"),
        ((*ARGUMENTS, "--block", "2.0"), "slide attention is in 0.0, 0.1, 1.0, 1.1"),
        ((*ARGUMENTS, "--block", "9"), "or by number 0 to 3"),
        ((*ARGUMENTS, "--query", "5"), "--query 5: expected points Y,X inside the 32x32 pixels"),
        ((*ARGUMENTS, "--query", "0,32"), "--query 0,32: expected points Y,X inside the 32x32 pixels"),
        ((*ARGUMENTS, "--query", *["1,1"] * 7), "7 queries: a picture has room for 6"),
        (("slide_pvt_tiny", "absent.png"), "cannot read the picture absent.png"),
        ((*ARGUMENTS, "--checkpoint", "absent.pth"), "absent.pth"),
        ((*ARGUMENTS, "--img-size", "32", "32", "32"), "expected a height and a width"),
        ((*ARGUMENTS, "--img-size", "40"), "must be multiples of 32"),
    ],
)
def test_a_bad_argument_is_one_line_and_leaves_no_folder(
    arguments: tuple[str, ...], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = () if "--img-size" in arguments else ("--img-size", "32")
    assert call(*arguments, *size, "--out", "o") == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "o").exists()

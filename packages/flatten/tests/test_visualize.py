"""Attention as a matrix against the layers themselves, the authors' picture, and what the verb writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import leap_flatten as lf
from leap_flatten import functional, visualize
from leap_flatten.verbs.pictures import Visualize
from leap_flatten.visualize import equivalent_attention, reference_attention_map
from leap_shared.cli import App
from leap_shared.errors import UserError
from leap_shared.testing import fill, golden

DIM, HEADS = 6, 2
HEAD_DIM = DIM // HEADS
ROUNDING = 1e-10  # float64; the layer sums in another order
sides = st.integers(1, 6)


def filled(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64 with every parameter random, as tables start at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def before_projection(layer: nn.Module, x: Tensor, hw: tuple[int, int]) -> Tensor:
    """What the layer gives to `proj` for the first item, (tokens, channels)."""
    found: list[Tensor] = []
    handle = layer.proj.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    layer(x, hw)
    handle.remove()
    return found[0][0]


def check(layer: nn.Module, x: Tensor, hw: tuple[int, int], values: Tensor, outputs: Tensor, head: int) -> None:
    """M_eq v + bias is the layer's output in every channel of a head."""
    for channel in range(HEAD_DIM):
        found = equivalent_attention(layer, x, head, channel, hw=hw)
        expected = outputs[:, head * HEAD_DIM + channel].clone()
        expected[found.prefix_tokens :] -= layer.dwc.bias[channel]
        torch.testing.assert_close(
            found.matrix @ values[:, head * HEAD_DIM + channel], expected, atol=ROUNDING, rtol=ROUNDING
        )


@given(
    sides,
    sides,
    st.integers(0, 2),
    st.integers(0, HEADS - 1),
    st.sampled_from(functional.DENOMINATORS),
    st.sampled_from([1, 3, 5, 7]),
    st.sampled_from([1, 2.5, 3]),
)
def test_the_matrix_times_the_values_is_what_the_layer_projects(
    height: int, width: int, prefix: int, head: int, denominator: str, kernel_size: int, power: float
) -> None:
    numbers = {"focusing_factor": power, "kernel_size": kernel_size, "denominator": denominator}
    layer = filled(lf.FocusedLinearAttention(DIM, HEADS, (height, width), prefix_tokens=prefix, **numbers))
    x = noise(1, prefix + height * width, DIM)
    check(layer, x, (height, width), layer.qkv(x)[0, :, 2 * DIM :], before_projection(layer, x, (height, width)), head)


@given(sides, sides, st.integers(1, 3), st.integers(0, HEADS - 1))
def test_the_matrix_of_reduced_keys_stretches_the_values_as_pvt_does(
    height: int, width: int, ratio: int, head: int
) -> None:
    hw = height * ratio, width * ratio
    layer = filled(lf.PVTFocusedLinearAttention(DIM, HEADS, hw, ratio))
    x = noise(1, math.prod(hw), DIM)
    source = x
    if ratio > 1:
        source = layer.norm(layer.sr(x.transpose(1, 2).unflatten(2, hw)).flatten(2).transpose(1, 2))
    found = equivalent_attention(layer, x, head)
    assert found.matrix.shape == (math.prod(hw), height * width)
    check(layer, x, hw, layer.kv(source)[0, :, DIM:], before_projection(layer, x, hw), head)


@given(sides, sides, st.integers(0, HEADS - 1), st.integers(0, 2))
def test_the_matrix_of_a_stripe_leaves_lepe_out(height: int, width: int, head: int, stripe: int) -> None:
    layer = filled(lf.CSWinFocusedLinearAttention(DIM, HEADS, (height, width)))
    qkv = noise(3, 3, height * width, DIM)
    matrix = equivalent_attention(layer, qkv, head, 1, item=stripe).matrix
    for parameter in layer.get_v.parameters():
        parameter.data.zero_()
    channel = head * HEAD_DIM + 1
    expected = layer(qkv)[stripe, :, channel] - layer.dwc.bias[1]
    torch.testing.assert_close(matrix @ qkv[2, stripe, :, channel], expected, atol=ROUNDING, rtol=ROUNDING)


def swin(hw: tuple[int, int] = (5, 7), **options: Any) -> nn.Module:
    return filled(lf.FocusedLinearAttention(DIM, HEADS, hw, **options))


def test_another_map_than_the_layers_own_is_resampled() -> None:
    layer, x = swin((4, 4)), noise(1, 30, DIM)
    check(layer, x, (5, 6), layer.qkv(x)[0, :, 2 * DIM :], before_projection(layer, x, (5, 6)), 1)


def test_a_layer_whose_scale_is_folded_has_its_matrix_too() -> None:
    layer, x = swin(), noise(1, 35, DIM)
    layer.floor = noise(DIM).abs()
    check(layer, x, (5, 7), layer.qkv(x)[0, :, 2 * DIM :], before_projection(layer, x, (5, 7)), 0)


def test_the_mean_channel_is_the_mean_of_the_channels_matrices() -> None:
    layer, x = swin(), noise(1, 35, DIM)
    matrices = [equivalent_attention(layer, x, 1, channel).matrix for channel in range(HEAD_DIM)]
    mean = equivalent_attention(layer, x, 1, "mean").matrix
    torch.testing.assert_close(mean, torch.stack(matrices).mean(0), atol=ROUNDING, rtol=ROUNDING)


def test_an_item_is_one_of_the_batch() -> None:
    layer, x = swin(), noise(3, 35, DIM)
    torch.testing.assert_close(equivalent_attention(layer, x, item=2).matrix, equivalent_attention(layer, x[2:]).matrix)


def test_convolution_restores_the_rank_that_a_head_bounds() -> None:
    layer, x = swin((8, 8)), noise(1, 64, DIM)
    plain, convolved = (equivalent_attention(layer, x, convolution=convolution) for convolution in (False, True))
    assert plain.rank() <= HEAD_DIM < 48 <= convolved.rank() <= 64


@pytest.mark.parametrize(("tolerance", "rank"), [(1e-3, 2), (0.0, 3), (0.5, 1), (1e-4, 3)])
def test_rank_counts_singular_values_above_a_share_of_the_largest(tolerance: float, rank: int) -> None:
    matrix = torch.diag(torch.tensor([2e-4 * 5, 5.0, 0.05]))
    assert visualize.EquivalentAttention(matrix, (1, 3), (1, 3)).rank(tolerance) == rank


def test_the_rank_of_nothing_is_0() -> None:
    assert visualize.EquivalentAttention(torch.zeros(4, 4), (2, 2), (2, 2)).rank() == 0


def test_attention_alone_is_a_mean_of_the_values() -> None:
    layer = swin()
    layer.qkv.bias.data[: 2 * DIM] = 20  # no dead heads, which the epsilon silences
    matrix = equivalent_attention(layer, noise(1, 35, DIM), convolution=False).matrix
    assert (matrix > 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(35, dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_head_of_dead_queries_attends_to_nothing() -> None:
    layer = swin()
    layer.qkv.weight.data[:DIM] = 0
    layer.qkv.bias.data[:HEAD_DIM], layer.qkv.bias.data[HEAD_DIM:DIM] = -1, 1
    assert equivalent_attention(layer, noise(1, 35, DIM), convolution=False).matrix.sum(1).max() < 1e-6


def test_half_precision_is_computed_in_single() -> None:
    layer, x = swin().half(), noise(1, 35, DIM).half()
    found = equivalent_attention(layer, x).matrix
    assert found.dtype == torch.float32


def test_a_query_is_looked_up_by_its_place() -> None:
    layer, x = swin(prefix_tokens=1), noise(1, 36, DIM)
    found = equivalent_attention(layer, x)
    torch.testing.assert_close(found.query_map((2, 3)), found.matrix[1 + 2 * 7 + 3, 1:].view(5, 7))
    torch.testing.assert_close(found.query_map(0), found.matrix[0, 1:].view(5, 7))


def test_taps_stand_around_their_query_and_stop_at_the_border() -> None:
    layer = swin()
    found = equivalent_attention(layer, noise(1, 35, DIM))
    plain = equivalent_attention(layer, noise(1, 35, DIM), convolution=False)
    taps = found.query_map((0, 6)) - plain.query_map((0, 6))
    torch.testing.assert_close(taps[:3, 4:], layer.dwc.weight[0, 0, 2:, :3].detach(), atol=ROUNDING, rtol=ROUNDING)
    assert taps[3:].abs().max() == taps[:, :4].abs().max() == 0


def test_the_layer_stays_as_it_was() -> None:
    layer, x = swin(), noise(1, 35, DIM)
    before = layer(x)
    equivalent_attention(layer, x)
    assert torch.equal(layer(x), before)
    assert "attend" not in vars(layer)


@pytest.mark.golden
def test_the_authors_picture_is_met() -> None:
    (case,) = golden.cases(Path(__file__).parent / "golden", "attention_map_reference")
    q, k = (torch.from_numpy(np.abs(fill.tensor(name, (1, 2, 36, 8)))) for name in "qk")
    kernel = torch.from_numpy(fill.tensor("kernel", (8, 1, 5, 5), 0.05))
    found = reference_attention_map(q, k, kernel).numpy()
    assert np.abs(found - case.arrays["map"]).max() <= case.tolerance * np.abs(case.arrays["map"]).max()


@given(sides, sides, st.sampled_from([1, 3, 5, 7]))
def test_the_authors_picture_lays_taps_by_flat_offset(height: int, width: int, side: int) -> None:
    count = height * width
    q, k, kernel = noise(1, 1, count, 3).abs(), noise(1, 1, count, 3, seed=2).abs(), noise(3, 1, side, side)
    weights = q[0, 0] @ k[0, 0].T
    weights = weights / weights.sum(1, keepdim=True)
    for i in range(count):
        for row in range(side):
            for column in range(side):
                j = i + (row - side // 2) * width + column - side // 2
                if 0 <= j < count:
                    weights[i, j] += kernel[0, 0, row, column]
    expected = (weights.abs() / weights.abs().sum(1, keepdim=True) * (count / 196 * 10)).clamp(max=1)
    found = reference_attention_map(q, k, kernel, (height, width))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)  # the epsilon of the row sums


def test_the_authors_rendering_is_that_of_the_head_and_the_channel() -> None:
    layer, x = swin(prefix_tokens=1), noise(1, 36, DIM)
    found = equivalent_attention(layer, x, 1, 2, exact=False)
    features = layer.qkv(x)[:, 1:, : 2 * DIM].unflatten(2, (2, DIM))
    features[:, :, 1] += layer.positional_encoding[:, 1:]
    sharp = functional.focus((features.relu() + 1e-6) / nn.functional.softplus(layer.scale[:, :, None]))
    q, k = sharp.unflatten(3, (HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)[:, :, 1:]
    expected = reference_attention_map(q, k, layer.dwc.weight[2:].detach(), (5, 7))
    torch.testing.assert_close(found.matrix, expected.detach(), atol=ROUNDING, rtol=ROUNDING)


def test_the_authors_rendering_can_leave_the_convolution_out() -> None:
    layer, x = swin(), noise(1, 35, DIM)
    found = equivalent_attention(layer, x, exact=False, convolution=False).matrix
    plain = equivalent_attention(layer, x, convolution=False).matrix
    expected = (plain / plain.sum(1, keepdim=True) * (35 / 196 * 10)).clamp(max=1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)  # the epsilons


def nan_input() -> None:
    equivalent_attention(swin(), noise(1, 35, DIM).index_fill(1, torch.tensor([4]), math.nan))


def nan_kernel(exact: bool) -> None:
    layer = swin()
    layer.dwc.weight.data[0] = math.nan
    equivalent_attention(layer, noise(1, 35, DIM), exact=exact)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: equivalent_attention(nn.Linear(DIM, DIM), noise(1, 35, DIM)), "Linear is no focused linear attention"),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM), 2), "head 2: expected 0 to 1"),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM), -1), "head -1: expected 0 to 1"),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM), 0, 3), "channel 3: expected 0 to 2, or 'mean'"),
        (
            lambda: equivalent_attention(swin(), noise(1, 35, DIM), 0, "max"),
            "channel 'max': expected 0 to 2, or 'mean'",
        ),
        (lambda: equivalent_attention(swin(), noise(2, 35, DIM), item=2), "item 2: the batch has 2, expected 0 to 1"),
        (lambda: equivalent_attention(swin(), noise(1, 36, DIM)), "36 tokens are no map of 5x7"),
        (nan_input, "NaN or infinity"),
        (lambda: nan_kernel(True), "the attention is not finite"),
        (lambda: nan_kernel(False), "the attention is not finite"),
        (
            lambda: equivalent_attention(swin(), noise(1, 35, DIM)).query_map((5, 0)),
            "a row below 5 and a column below 7",
        ),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM)).query_map((0, -1)), "query (0, -1): expected a row"),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM)).query_map(0), "a number below 0 (class tokens)"),
        (lambda: equivalent_attention(swin(), noise(1, 35, DIM)).rank(1), "tolerance 1: expected a share"),
        (
            lambda: reference_attention_map(noise(1, 1, 35, 2), noise(1, 1, 35, 2), noise(2, 1, 5, 5)),
            "a map of 5x5: expected as many keys as queries, one for each place: give hw=(height, width)",
        ),
        (
            lambda: reference_attention_map(noise(1, 1, 36, 2), noise(1, 1, 36, 2), noise(2, 1, 4, 4)),
            "kernel_size 4: expected an odd number",
        ),
        (
            lambda: equivalent_attention(
                filled(lf.PVTFocusedLinearAttention(DIM, HEADS, (4, 4), 2)), noise(1, 16, DIM), exact=False
            ),
            "no form for reduced keys (sr_ratio above 1): pass exact=True",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], words: str) -> None:
    with pytest.raises(UserError) as refused:
        call()
    assert words in str(refused.value)


TINY: dict[str, dict[str, Any]] = {
    "flatten_swin_tiny": {"depths": (1, 2, 1, 1), "embed_dim": 8, "num_heads": (2, 2, 4, 4)},
    "flatten_pvt_tiny": {"depths": (1, 2, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 4)},
    "flatten_pvt_v2_b0": {"depths": (1, 2, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 4)},
    "flatten_cswin_tiny": {"depths": (1, 2, 1, 1), "embed_dim": 8, "num_heads": (2, 2, 4, 4)},
    "flatten_deit_tiny": {"depth": 3, "embed_dim": 8, "num_heads": 2},
}


@pytest.mark.parametrize("name", TINY)
def test_blocks_are_found_by_stage_and_number_in_every_family(name: str) -> None:
    model = timm.create_model(name, **TINY[name], img_size=(32, 64)).eval()
    linear = list(visualize.linear_layers(model))
    expected = {
        "flatten_swin_tiny": ["0.0", "1.0", "1.1"],
        "flatten_cswin_tiny": ["0.0", "1.0", "1.1"],
        "flatten_deit_tiny": ["0.0", "0.1", "0.2"],
    }
    assert linear == expected.get(name, ["0.0", "1.0", "1.1", "2.0", "3.0"])
    image = noise(1, 3, 32, 64).float()
    for block in linear:
        layer, x, hw = visualize.layer_input(model, image, block)
        found = equivalent_attention(layer, x, hw=hw)
        assert found.matrix.shape[0] == found.prefix_tokens + math.prod(hw)
        assert hw[1] == 2 * hw[0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_softmax_block_is_refused_and_the_linear_ones_named() -> None:
    model = timm.create_model("flatten_swin_tiny", **TINY["flatten_swin_tiny"], img_size=32)
    with pytest.raises(UserError, match=r"block '2\.0' .* linear attention is in 0\.0, 1\.0, 1\.1"):
        visualize.layer_input(model, noise(1, 3, 32, 32).float(), "2.0")


def test_a_model_of_softmax_alone_is_refused() -> None:
    model = timm.create_model("flatten_swin_tiny", **TINY["flatten_swin_tiny"], img_size=32, attn_type="SSSS")
    with pytest.raises(UserError, match="the model has none"):
        visualize.layer_input(model, noise(1, 3, 32, 32).float(), "0.0")


def test_a_picture_is_upright_and_cut_at_its_longer_sides(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # red on the left; turned clockwise, above
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    seen = np.asarray(visualize.load_picture(tmp_path / "turned.png", (32, 16)))
    assert seen.shape == (32, 16, 3)
    assert (seen[2, :, 0].min(), seen[29, :, 0].max()) == (255, 0)
    square = np.asarray(visualize.load_picture(tmp_path / "turned.png", (16, 16)))
    assert (square[:, :, 0] > 128).mean() == 0.5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_a_picture_of_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (9, 7), (200, 100, 50)).convert(mode).save(path)
    assert visualize.to_input(visualize.load_picture(path, (32, 32))).shape == (1, 3, 32, 32)


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        App("leap-flatten", "leap_flatten", (Visualize,)).main(("visualize", *arguments))
    return int(stopped.value.code or 0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path


OPTIONS = ("flatten_pvt_v2_b0", "photo.png", "--block", "1.0", "--device", "cpu")


def test_pictures_and_ranks_are_written_and_random_weights_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = ("--query", "0,0", "63,95")
    assert call(*OPTIONS, "--img-size", "64", "96", *queries, "--channel", "mean", "--out", "o", "--json") == 0
    told = capsys.readouterr()
    facts = json.loads(told.out)
    assert facts == json.loads((here / "o/ranks.json").read_text())
    assert (facts["map"], facts["query_tokens"]) == ([8, 12], ["0,0", "7,11"])
    assert facts["rank_attention"] <= facts["head_dim"] == 32 < facts["rank_with_convolution"] <= 96
    assert facts["weights"] == "random"
    assert "random weights" in told.err
    for name in ("attention.png", "spectrum.png"):
        with Image.open(here / "o" / name) as picture:
            assert min(picture.size) > 400
    assert sorted(path.name for path in (here / "o").iterdir()) == [
        "attention.png",
        "config.yaml",
        "ranks.json",
        "spectrum.png",
    ]


def test_weights_of_a_file_are_drawn_without_a_warning(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lf.save_safetensors(lf.create_model("flatten_pvt_v2_b0"), here / "w.safetensors")
    assert call(*OPTIONS, "--img-size", "32", "--checkpoint", "w.safetensors", "--out", "o", "--json") == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["weights"] == "w.safetensors"
    assert "random" not in told.err


def test_the_same_seed_draws_the_same_picture(here: Path) -> None:
    for folder in ("a", "b"):
        assert call(*OPTIONS, "--img-size", "32", "--query", "5,9", "--out", folder) == 0
    assert (here / "a/attention.png").read_bytes() == (here / "b/attention.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("flatten_swin_tini", "photo.png"), "did you mean flatten_swin_tiny"),
        ((*OPTIONS[:2], "--block", "4.0"), "linear attention is in 0.0, 0.1, 1.0"),
        ((*OPTIONS, "--head", "9"), "head 9: expected 0 to 1"),
        ((*OPTIONS, "--channel", "99"), "channel 99: expected 0 to 31"),
        ((*OPTIONS, "--query", "5"), "--query 5: expected points Y,X inside the 32x32 pixels"),
        ((*OPTIONS, "--query", "0,32"), "--query 0,32: expected points Y,X inside the 32x32 pixels"),
        ((*OPTIONS, "--query", *["1,1"] * 9), "9 queries: a picture has room for 8"),
        (("flatten_pvt_v2_b0", "absent.png"), "cannot read the picture absent.png"),
        (("flatten_pvt_v2_b0", "text.png"), "cannot read the picture text.png"),
        ((*OPTIONS, "--checkpoint", "absent.pth"), "absent.pth"),
        ((*OPTIONS, "--img-size", "32", "32", "32"), "expected a height and a width"),
        ((*OPTIONS, "--img-size", "40"), "must be multiples of 32"),
    ],
)
def test_a_bad_argument_is_one_line_and_leaves_no_folder(
    arguments: tuple[str, ...], words: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "text.png").write_text("no picture")
    size = () if "--img-size" in arguments else ("--img-size", "32")
    assert call(*arguments, *size, "--out", "o") == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (here / "o").exists()

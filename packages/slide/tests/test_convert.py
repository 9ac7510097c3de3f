"""One path in place of two, weights of softmax attention, and files of other kinds."""

from __future__ import annotations

import copy
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from timm.models import vision_transformer
from timm.models.pvt_v2 import PyramidVisionTransformerV2
from timm.models.swin_transformer import SwinTransformer, WindowAttention
from tiny import FAMILIES, drawn, images, model
from torch import Tensor, nn

import leap_slide as ls
from leap_shared.errors import UserError
from leap_shared.vision.bodies import PVT
from leap_slide.checkpoints import create_model, load_official
from leap_slide.convert import convert, from_swin, reparameterize, reparameterize_file, to_head_major, to_packed
from leap_slide.models.variants import VARIANTS

MERGED = 1e-6  # of the largest output: the sum of the two kernels is rounded once
SAME = 1e-5  # of the largest output: timm and this package add up in other orders, over a whole model
State = dict[str, Tensor]


def apart(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_model_with_one_path_gives_what_it_gave(family: str) -> None:
    network = model(family)
    assert network.reparameterized is False
    with torch.inference_mode():
        wanted = network(images())
        assert reparameterize(network) is network
        assert apart(network(images()), wanted) < MERGED
    assert network.reparameterized
    names = [name for name in network.state_dict() if "dep_conv" in name]
    assert names
    assert all("dep_conv_merged" in name for name in names)


def test_layer_alone_is_merged() -> None:
    layer = drawn(ls.SlideAttention(8, 2)).eval()
    assert not layer.reparameterized
    assert reparameterize(layer).reparameterized


def test_merging_twice_changes_nothing() -> None:
    network = reparameterize(model("swin"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    reparameterize(network.train())  # there is nothing left to merge, so training is no obstacle
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_merging_in_the_middle_of_training_is_refused_unless_forced() -> None:
    network = model("swin").train()
    with pytest.raises(UserError, match=r"training mode, and an optimiser would go on holding .*model.eval\(\).*force"):
        reparameterize(network)
    assert not any("merged" in name for name in network.state_dict())
    assert reparameterize(network, force=True).reparameterized


def test_merging_a_model_that_is_partly_in_training_is_refused() -> None:
    network = model("swin")
    network.layers[1].train()
    with pytest.raises(UserError, match="training mode"):
        reparameterize(network)


def test_merged_parameters_are_trained_on() -> None:
    network = reparameterize(model("swin"))
    network(images()).sum().backward()
    kernel = network.get_parameter("layers.0.blocks.0.attn.dep_conv_merged.weight")
    assert kernel.grad is not None
    assert kernel.grad.any()


FORMS: list[dict[str, Any]] = [{}, {"share_kernel": False}, {"single_bias": True}, {"rel_pos_bias": False}]


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merged_file_is_that_of_the_merged_model(tmp_path: Path, options: dict[str, Any], suffix: str) -> None:
    network = model("swin", slide_options=options)
    torch.save({"model": network.state_dict(), "optimizer": {}}, tmp_path / "w.pth")
    told = reparameterize_file(tmp_path / "w.pth", tmp_path / f"deploy{suffix}")
    assert (told.variant, told.verified) == (None, "tensors")
    other = reparameterize(drawn(copy.deepcopy(network), seed=9))
    load_official(other, tmp_path / f"deploy{suffix}")
    wanted = reparameterize(network).state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items())


def test_file_without_two_paths_cannot_be_merged(tmp_path: Path) -> None:
    torch.save(model("swin", num_slide_stages=0).state_dict(), tmp_path / "none.pth")
    torch.save(reparameterize(model("swin")).state_dict(), tmp_path / "one.pth")
    with pytest.raises(UserError, match="has no two paths: expected dep_conv1"):
        reparameterize_file(tmp_path / "none.pth", tmp_path / "b.pth")
    with pytest.raises(UserError, match="has one path already"):
        reparameterize_file(tmp_path / "one.pth", tmp_path / "b.pth")
    assert not (tmp_path / "b.pth").exists()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9))
def test_orders_of_projections_are_inverse(heads: int, dim: int, columns: int, seed: int) -> None:
    shape = (3 * heads * dim, *([columns] if columns else []))
    packed = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(to_packed(to_head_major(packed, heads), heads), packed)
    assert torch.equal(to_head_major(to_packed(packed, heads), heads), packed)


@given(st.integers(1, 5), st.integers(1, 4))
def test_head_major_rows_are_q_k_v_of_each_head(heads: int, dim: int) -> None:
    rows = to_head_major(torch.arange(3 * heads * dim), heads).reshape(heads, 3, dim)
    for head in range(heads):
        for part in range(3):
            assert rows[head, part].tolist() == [part * heads * dim + head * dim + channel for channel in range(dim)]


@pytest.mark.parametrize("change", [to_head_major, to_packed])
@pytest.mark.parametrize(("shape", "heads"), [((10, 4), 2), ((12,), 0), ((0, 4), 1)])
def test_rows_that_are_no_projection_are_refused(change: Any, shape: tuple[int, ...], heads: int) -> None:
    with pytest.raises(UserError, match=r"expected a multiple of 3 \* heads as the number of rows"):
        change(torch.zeros(shape), heads)


def near(size: tuple[int, int], radius: int) -> Tensor:
    """Which pixels of a map (pixels, pixels) are neighbours."""
    row, column = (x.flatten() for x in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
    return ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)


SOURCES: dict[str, Any] = {
    "ViT": lambda: vision_transformer.Attention(12, num_heads=3, qkv_bias=True),
    "ViT without bias": lambda: vision_transformer.Attention(12, num_heads=3),
    "Swin": lambda: WindowAttention(12, num_heads=3, window_size=(5, 4)),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_layer_of_plain_shifts_is_the_sources_attention_among_neighbours(kind: str, kernel_size: int) -> None:
    source: Any = drawn(SOURCES[kind]()).eval()
    bias = source.qkv.bias is not None
    layer = ls.SlideAttention(12, 3, kernel_size, qkv_bias=bias, mask_padding=True).eval()
    told = from_swin(layer, source)
    assert set(told.left) >= {"dep_conv.weight", "dep_conv1.weight", "relative_position_bias_table"}
    assert set(told.taken) == {name for name in layer.state_dict() if name.startswith(("qkv", "proj"))}
    assert told.unused == (("relative_position_bias_table",) if kind == "Swin" else ())
    with torch.no_grad():
        for name, value in layer.named_parameters():
            if name.startswith("dep_conv1") or name in ("dep_conv.bias", "relative_position_bias_table"):
                value.zero_()
    x = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        query, key, value = source.qkv(x).reshape(2, 20, 3, 3, 4).permute(2, 0, 3, 1, 4)
        for own, theirs in zip(layer.projected(x, (5, 4)), (query, key, value), strict=True):
            assert apart(own.flatten(3).transpose(2, 3), theirs) < MERGED
        out = F.scaled_dot_product_attention(query, key, value, near((5, 4), kernel_size // 2))
        assert apart(layer(x, (5, 4)), source.proj(out.transpose(1, 2).flatten(2))) < MERGED


def test_layer_takes_a_prefix_of_a_whole_vision_transformer(tmp_path: Path) -> None:
    source = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2)
    torch.save({"model": source.state_dict()}, tmp_path / "deit.pth")
    layer = ls.SlideAttention(192, 3)
    from_swin(layer, tmp_path / "deit.pth", prefix="blocks.1.attn.")
    assert torch.equal(to_packed(layer.qkv.weight, 3), source.get_parameter("blocks.1.attn.qkv.weight"))
    with pytest.raises(UserError, match=r"cls_token, .*fits SlideAttention: .*prefix='blocks.0.attn.'"):
        from_swin(layer, tmp_path / "deit.pth")


def timm_swin() -> Any:
    sizes: dict[str, Any] = {"depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 2), "window_size": 2}
    return drawn(SwinTransformer(img_size=64, embed_dim=8, num_classes=7, **sizes)).eval()


def official_swin() -> State:
    """timm's Swin by the names of Swin's own release."""
    names = {f"layers.{stage}.downsample": f"layers.{stage - 1}.downsample" for stage in (1, 2, 3)}
    state = {}
    for name, value in timm_swin().state_dict().items():
        part = ".".join(name.split(".")[:3])
        state[name.replace(part, names.get(part, part)).replace("head.fc", "head")] = value
    return {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4)}


@pytest.mark.parametrize("names", ["timm", "official"])
def test_every_weight_of_swin_finds_its_place(names: str) -> None:
    """Without slide attention the model is Swin, and gives what timm's gives."""
    network = model("swin", num_slide_stages=0)
    told = from_swin(network, timm_swin() if names == "timm" else {"model": official_swin()})
    assert (told.left, told.unused, told.resampled) == ((), (), ())
    with torch.inference_mode():
        assert apart(network(images()), timm_swin()(images())) < SAME


def test_slide_stages_of_swin_take_rows_in_their_order_and_the_others_as_they_are() -> None:
    network, source = model("swin"), timm_swin().state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    told = from_swin(network, source)
    slide, window = "layers.1.blocks.0.attn.qkv.weight", "layers.2.blocks.1.attn.qkv.weight"
    assert torch.equal(network.get_parameter(slide), to_head_major(source[slide], 2))
    assert torch.equal(network.get_parameter(window), source[window])
    kept = ("dep_conv.weight", "dep_conv.bias", "dep_conv1.weight", "dep_conv1.bias", "relative_position_bias_table")
    attention = [f"layers.{stage}.blocks.0.attn.{name}" for stage in (0, 1) for name in kept]
    assert sorted(told.left) == sorted(attention)
    assert all(torch.equal(network.get_parameter(name), before[name]) for name in told.left)
    assert [name for name in told.unused if "table" not in name] == []
    assert str(told) == f"{len(before) - 10} taken, 0 resampled, 10 left as initialised, 2 of the source unused"


def test_tables_of_windows_of_another_size_are_resampled() -> None:
    network = model("swin", window_size=56)
    told = from_swin(network, timm_swin())
    name = "layers.2.blocks.0.attn.relative_position_bias_table"  # windows of 2 there, of 4 here
    table = timm_swin().get_parameter(name).unflatten(0, (3, 3)).permute(2, 0, 1)[None]
    wanted = F.interpolate(table, (7, 7), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(network.get_parameter(name), wanted)
    assert told.resampled == (name, "layers.2.blocks.1.attn.relative_position_bias_table")


def test_head_for_other_classes_is_left() -> None:
    network = model("swin")
    network.reset_classifier(3)
    told = from_swin(network, timm_swin())
    assert {"head.weight", "head.bias"} <= set(told.left) & set(told.unused)


PVT_SIZES: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 2)}


def pvt_with_class_token() -> tuple[Any, State]:
    source = drawn(PVT(img_size=64, num_classes=7, mlp_ratios=(2, 2, 2, 2), **PVT_SIZES)).eval()
    state = dict(source.state_dict())
    state["pos_embed4"] = torch.cat((torch.full((1, 1, 16), 9.0), state["pos_embed4"]), 1)
    return source, {**state, "cls_token": torch.zeros(1, 1, 16)}


def test_every_weight_of_pvt_but_its_class_token_finds_its_place() -> None:
    network, (source, state) = model("pvt", num_slide_stages=0), pvt_with_class_token()
    told = from_swin(network, state)
    assert (told.left, told.unused) == ((), ("cls_token",))
    with torch.inference_mode():
        assert torch.equal(network(images()), source(images()))


def test_every_weight_of_timms_pvt_v2_finds_its_place() -> None:
    sizes = {**PVT_SIZES, "mlp_ratios": (2, 2, 2, 2)}
    source = drawn(PyramidVisionTransformerV2(num_classes=7, **sizes)).eval()
    network = model("pvt_v2", num_slide_stages=0)
    told = from_swin(network, source)
    assert (told.left, told.unused, told.resampled) == ((), (), ())
    with torch.inference_mode():
        assert apart(network(images()), source(images())) < SAME


def test_projections_of_pvt_are_joined_in_slide_stages() -> None:
    network, (_, state) = model("pvt"), pvt_with_class_token()
    told = from_swin(network, state)
    attention = "block2.0.attn"
    packed = torch.cat((state[f"{attention}.q.weight"], state[f"{attention}.kv.weight"]))
    assert torch.equal(to_packed(network.get_parameter(f"{attention}.qkv.weight"), 2), packed)
    assert {f"{attention}.{name}" for name in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")} < set(told.unused)
    assert all("dep_conv" in name or "bias_table" in name for name in told.left)


def test_weights_for_another_image_size_start_a_model() -> None:
    network, (_, state) = model("pvt", img_size=96), pvt_with_class_token()
    told = from_swin(network, state)
    assert told.resampled == ("pos_embed1", "pos_embed2", "pos_embed3", "pos_embed4")
    assert network.get_parameter("pos_embed4").abs().max() < 9  # the row of the class token is not in it


@pytest.mark.parametrize("options", [{"dim_reduction": 2}, {"share_qkv": True}], ids=str)
def test_projections_of_other_sizes_are_left(options: dict[str, Any]) -> None:
    layer = ls.SlideAttention(12, 3, **options)
    told = from_swin(layer, vision_transformer.Attention(12, num_heads=3, qkv_bias=True))
    assert {"qkv.weight", "qkv.bias"} <= set(told.left) & set(told.unused)


def test_weights_that_have_slide_attention_already_are_refused() -> None:
    with pytest.raises(UserError, match=r"weights of slide attention: use leap_slide\.load_official"):
        from_swin(model("swin"), model("swin"))


def test_weights_of_which_nothing_fits_are_refused() -> None:
    with pytest.raises(UserError, match=r"nothing of these weights \(weight, bias, \.\.\.\) fits SlideSwin"):
        from_swin(model("swin"), nn.Linear(3, 3))


NAME = "slide_pvt_tiny"


@pytest.fixture(scope="module")
def weights() -> State:
    """Weights of a variant, with what a bit could get lost in: -0.0, a denormal, NaN."""
    state = drawn(create_model(NAME)).state_dict()
    state["head.bias"][:3] = torch.tensor([-0.0, 1e-42, math.nan])
    return {name: value.clone() for name, value in state.items()}


def bits(state: State) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes()) for name, x in state.items()}


def test_conversion_there_and_back_keeps_every_bit(tmp_path: Path, weights: State) -> None:
    torch.save({"model": {f"module.{name}": x for name, x in weights.items()}, "epoch": 3}, tmp_path / "a.pth")
    told = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    back = convert(tmp_path / "b.safetensors", tmp_path / "c.pth")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        between = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        assert file.metadata() == {"format": "pt", "model": NAME}
    again = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(again) == ["model"]
    assert bits(between) == bits(again["model"]) == bits(weights)
    assert (told.variant, told.tensors, told.parameters) == (NAME, len(weights), VARIANTS[NAME].parameters)
    assert told.verified == back.verified == "tensors and logits"
    assert told.sha256 == hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()


def test_file_of_a_variant_is_merged_with_its_logits_checked(tmp_path: Path, weights: State) -> None:
    average = {name: value.clone() for name, value in weights.items()}
    average["head.bias"] = torch.zeros(1000)
    torch.save({"model": weights, "state_dict_ema": average}, tmp_path / "a.pth")
    told = reparameterize_file(tmp_path / "a.pth", tmp_path / "deploy.safetensors", use_ema=True)
    assert (told.variant, told.verified) == (NAME, "tensors and logits")
    deployed = create_model(NAME, checkpoint=tmp_path / "deploy.safetensors").eval()
    trained = create_model(NAME).eval()
    trained.load_state_dict(average)
    x = images((224, 224), batch=1)
    with torch.inference_mode():
        assert apart(deployed(x), trained(x)) < MERGED
    again = convert(tmp_path / "deploy.safetensors", tmp_path / "deploy.pth")
    assert (again.variant, again.verified) == (NAME, "tensors and logits")


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a.pth", "b.onnx", r"b.onnx ends in .onnx: expected .pth or .safetensors"),
        ("a.pth", "a.pth", r"a.pth would replace the file that it is made of: give another name"),
        ("absent.pth", "b.safetensors", r"cannot read the checkpoint .*absent.pth"),
        ("a.pth", "absent/b.safetensors", r"cannot write .*absent"),
    ],
)
@pytest.mark.parametrize("change", [convert, reparameterize_file])
def test_conversion_refuses(tmp_path: Path, change: Any, source: str, target: str, message: str) -> None:
    torch.save({"model": model("swin").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        change(tmp_path / source, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]

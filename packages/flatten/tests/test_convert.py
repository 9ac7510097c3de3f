"""Conversion keeps every bit, and folding keeps the function."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import FAMILIES, drawn, images, model
from torch import Tensor, nn

import leap_flatten as lf
from leap_flatten.attention import Focused
from leap_flatten.convert import convert, fuse_for_inference
from leap_flatten.models import CSWinBlock, Site, branch_attention
from leap_shared.checkpoints import write_safetensors
from leap_shared.errors import UserError
from leap_shared.ops import use
from leap_shared.testing.golden import read_schema

# Of the largest output; float32 rounds the folded weights and biases once more, and each of a model's few layers adds
# its part: 2e-7 in one layer, up to 8e-7 behind a model's head.
LAYER, MODEL = 4e-7, 2e-6
ALGEBRA = 1e-12  # in float64: heads with few and small positive entries magnify rounding

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "packed": lambda: lf.FocusedLinearAttention(12, 3, (5, 7)),
    "packed without bias": lambda: lf.FocusedLinearAttention(12, 3, (5, 7), qkv_bias=False),
    "with class token": lambda: lf.FocusedLinearAttention(12, 3, (5, 7), prefix_tokens=1),
    "other numbers": lambda: lf.FocusedLinearAttention(12, 3, (5, 7), 4, 3, "sum"),
    "reduced": lambda: lf.PVTFocusedLinearAttention(12, 3, (6, 8), 2),
    "apart without bias": lambda: lf.PVTFocusedLinearAttention(12, 3, (5, 7), qkv_bias=False),
}


def apart(got: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def tokens_of(layer: Any) -> Tensor:
    """Two items of random tokens for a stand-alone layer."""
    ratio = getattr(layer, "sr_ratio", 1)
    count = layer.prefix_tokens + layer.grid[0] * layer.grid[1] * ratio**2
    return torch.randn(2, count, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_folded_layer_gives_what_the_layer_gives(name: str, backend: str) -> None:
    layer = drawn(LAYERS[name]()).eval()
    fused, x = fuse_for_inference(layer), tokens_of(layer)
    with use(backend), torch.inference_mode():
        assert apart(fused(x), layer(x)) < LAYER


def test_folded_layer_keeps_heads_without_positive_queries() -> None:
    layer = drawn(lf.FocusedLinearAttention(12, 6, (5, 7))).eval()
    with torch.no_grad():
        layer.qkv.bias[:12].sub_(20)
    fused, x = fuse_for_inference(layer), tokens_of(layer)
    with torch.inference_mode():
        assert (layer.qkv(x)[..., :12] < 0).all()
        assert apart(fused(x), layer(x)) < LAYER


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hw", [(64, 64), (96, 64)])
def test_folded_model_gives_what_the_model_gives_at_every_size(family: str, hw: tuple[int, int]) -> None:
    given = model(family, dynamic_img_size=True)
    fused, x = fuse_for_inference(given), images(hw)
    with torch.inference_mode():
        wanted = given(x)
        assert apart(fused(x), wanted) < MODEL
        fused.set_input_size(hw)
        assert apart(fused(x), wanted) < MODEL


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_folded_model_is_folded(family: str) -> None:
    layers = [layer for layer in fuse_for_inference(model(family)).modules() if isinstance(layer, Focused)]
    assert layers
    assert all(layer.floor is not None and "scale" not in dict(layer.named_parameters()) for layer in layers)


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(1, 2), st.integers(1, 3))
def test_blocks_of_stripes_of_every_size_fold(
    height: int, width: int, qkv_bias: bool, num_heads: int, split: int
) -> None:
    site = Site(0, 0, 8, 2 * num_heads, (height, width), plugged=True, qkv_bias=qkv_bias)
    block = drawn(CSWinBlock(site, branch_attention(), split)).double().eval()
    x = torch.randn(2, height * width, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert apart(fuse_for_inference(block)(x, (height, width)), block(x, (height, width))) < ALGEBRA


def test_feature_pyramids_fold() -> None:
    options = {"features_only": True, "embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 2)}
    pyramid = drawn(lf.create_model("flatten_pvt_v2_b0", **options)).eval()
    fused, x = fuse_for_inference(pyramid), images()
    with torch.inference_mode():
        pairs = list(zip(fused(x), pyramid(x), strict=True))
    assert all(apart(got, wanted) < MODEL for got, wanted in pairs)


def test_folding_leaves_the_model_as_it_was() -> None:
    given = model("cswin").train()
    before = copy.deepcopy(given.state_dict())
    fused = fuse_for_inference(given)
    assert given.training
    assert not fused.training
    assert all(parameter.requires_grad for parameter in given.parameters())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())
    shared = {x.data_ptr() for x in given.state_dict().values()} & {x.data_ptr() for x in fused.state_dict().values()}
    assert not shared


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_twice_changes_nothing(family: str) -> None:
    once = fuse_for_inference(model(family))
    twice = fuse_for_inference(once)
    assert twice is not once
    with torch.inference_mode():
        assert torch.equal(twice(images()), once(images()))


def test_a_model_without_linear_attention_stays_as_it_is() -> None:
    given = model("swin", attn_type="SSSS")
    with torch.inference_mode():
        assert torch.equal(fuse_for_inference(given)(images()), given(images()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_every_precision_fold(dtype: torch.dtype) -> None:
    given = model("deit").to(dtype)
    x = images().to(dtype)
    with torch.inference_mode():
        assert apart(fuse_for_inference(given)(x), given(x)) < 8 * torch.finfo(dtype).eps


def test_folded_model_refuses_weights_that_are_not_folded(tmp_path: Path) -> None:
    given = model("swin")
    fused = fuse_for_inference(given)
    lf.save_safetensors(given, tmp_path / "w.safetensors")
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    with pytest.raises(UserError, match=r"missing: .*attn.floor.* unexpected: .*attn.scale"):
        lf.load_official(fused, tmp_path / "w.safetensors")
    for strict in (True, False):
        with pytest.raises(UserError, match=r"layers.0.blocks.0.attn.scale is folded .*: load the weights, then fold"):
            fused.load_state_dict(given.state_dict(), strict=strict)
    attention = [name for name in before if ".attn." in name]
    assert all(torch.equal(fused.state_dict()[name], before[name]) for name in attention)


def test_folded_weights_are_no_checkpoint_of_the_model(tmp_path: Path) -> None:
    given = model("pvt")
    lf.save_safetensors(fuse_for_inference(given), tmp_path / "fused.safetensors")
    with pytest.raises(UserError, match=r"missing: .*attn.scale.* unexpected: .*attn.floor"):
        lf.load_official(given, tmp_path / "fused.safetensors")


def test_folded_weights_load_into_a_folded_model_whose_scales_were_others(tmp_path: Path) -> None:
    fused = fuse_for_inference(model("cswin"))
    lf.save_safetensors(fused, tmp_path / "fused.safetensors")
    other = fuse_for_inference(drawn(model("cswin"), seed=5))
    lf.load_official(other, tmp_path / "fused.safetensors")
    with torch.inference_mode():
        assert torch.equal(other(images()), fused(images()))


def test_a_branch_alone_has_nothing_to_fold_into() -> None:
    branch = lf.CSWinFocusedLinearAttention(8, 2, (4, 4))
    with pytest.raises(UserError, match=r"this branch has no projections .*: give the CSWinBlock"):
        fuse_for_inference(branch)


def test_wrapped_projections_are_refused() -> None:
    layer = lf.FocusedLinearAttention(8, 2, (4, 4))
    layer.qkv = nn.utils.parametrizations.weight_norm(layer.qkv)
    with pytest.raises(UserError, match=r"a projection is a ParametrizedLinear: fold before layers are wrapped"):
        fuse_for_inference(layer)


NAME = "flatten_pvt_v2_b0"  # the smallest variant


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of a variant, with what a bit could get lost in: -0.0, a denormal, NaN."""
    state = drawn(lf.create_model(NAME)).state_dict()
    state["head.bias"][:3] = torch.tensor([-0.0, 1e-42, float("nan")])
    return {name: value.clone() for name, value in state.items()}


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (x.dtype, x.shape, x.contiguous().view(torch.uint8).numpy().tobytes()) for name, x in state.items()}


def envelope(state: dict[str, Tensor]) -> dict[str, Any]:
    """As the authors write it, with a moving average, and tables that are computed."""
    average = {name: value + 1 for name, value in state.items()}
    return {"model": {f"module.{name}": value for name, value in state.items()}, "state_dict_ema": average, "epoch": 3}


def test_conversion_there_and_back_keeps_every_bit(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(envelope(weights), tmp_path / "a.pth")
    told = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    back = convert(tmp_path / "b.safetensors", tmp_path / "c.pth")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        between = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        assert file.metadata() == {"format": "pt", "model": NAME}
    again = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(again) == ["model"]
    assert bits(between) == bits(again["model"]) == bits(weights)
    assert (told.variant, told.tensors, told.parameters) == (NAME, len(weights), lf.VARIANTS[NAME].parameters)
    assert told.verified == back.verified == "tensors and logits"
    assert told.sha256 == hashlib.sha256((tmp_path / "b.safetensors").read_bytes()).hexdigest()


def test_conversion_keeps_logits(tmp_path: Path) -> None:
    given = drawn(lf.create_model(NAME)).eval()
    torch.save({"model": given.state_dict()}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", verify=False)
    read = lf.create_model(NAME, checkpoint=tmp_path / "b.safetensors").eval()
    x = images((224, 224), batch=1)
    with torch.inference_mode():
        assert torch.equal(read(x), given(x))


def test_conversion_takes_the_moving_average(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(envelope(weights), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", use_ema=True)
    found = lf.create_model(NAME, checkpoint=tmp_path / "b.safetensors").state_dict()
    assert torch.equal(found["patch_embed1.proj.bias"], weights["patch_embed1.proj.bias"] + 1)


def test_conversion_keeps_precision_and_tells_a_variant_with_other_classes(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    half = {name: value.bfloat16() for name, value in weights.items()}
    half["head.weight"], half["head.bias"] = half["head.weight"][:5], half["head.bias"][:5]
    torch.save({"model": half}, tmp_path / "a.pth")
    told = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert (told.variant, told.verified) == (NAME, "tensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert bits({name: file.get_tensor(name) for name in half}) == bits(half)


def test_conversion_of_other_models_names_no_variant(tmp_path: Path) -> None:
    state = model("swin").state_dict()
    torch.save(state, tmp_path / "a.pth")
    told = convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert (told.variant, told.verified) == (None, "tensors")


def test_verification_finds_a_changed_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
        name = "blocks.0.attn.scale"
        write_safetensors(path, {**state, name: state[name].nextafter(torch.tensor(9.0))}, metadata)

    monkeypatch.setattr("leap_shared.vision.official.write_safetensors", damaged)
    torch.save(model("deit").state_dict(), tmp_path / "a.pth")
    with pytest.raises(RuntimeError, match=r"1 tensors are not those that were read: \['blocks.0.attn.scale'\]"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors")


@pytest.mark.slow
def test_conversion_to_the_authors_format_has_every_entry_that_their_models_ask_for(tmp_path: Path) -> None:
    schema = read_schema(Path(__file__).parent / "golden/schemas/flatten_swin_tiny_224.json.gz")
    lf.save_safetensors(lf.create_model("flatten_swin_tiny"), tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    found = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    masks = [name for name in found if name.endswith("attn_mask")]
    assert masks == [f"layers.2.blocks.{block}.attn_mask" for block in (1, 3, 5)]
    entries = {name: (tuple(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in found.items()}
    assert {name: entry for name, entry in entries.items() if name not in masks} == schema  # which leaves masks out


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("a.pth", "b.onnx", r"b.onnx ends in .onnx: expected .pth or .safetensors"),
        ("a.pth", "b", r"b ends in nothing: expected"),
        ("a.npz", "b.pth", r"a.npz ends in .npz: expected"),
        ("a.pth", "a.pth", r"a.pth would replace the file that it is made of: give another name"),
        ("absent.pth", "b.safetensors", r"cannot read the checkpoint .*absent.pth"),
        ("a.pth", "absent/b.safetensors", r"cannot write .*absent"),
    ],
)
def test_conversion_refuses(tmp_path: Path, source: str, target: str, message: str) -> None:
    torch.save({"model": model("deit").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / source, tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]


def test_conversion_without_a_moving_average_says_so(tmp_path: Path) -> None:
    torch.save({"model": model("deit").state_dict()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no moving average"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors", use_ema=True)

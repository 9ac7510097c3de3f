"""Files: training and deploy files in every envelope, other sizes, refusals that say what to do, and round trips."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from tiny import FAMILIES, KINDS, drawn, images, model
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.testing import golden
from leap_slide.checkpoints import create_model, load_official, resize_tables, save_safetensors, variants_of
from leap_slide.convert import reparameterize
from leap_slide.models.variants import VARIANTS

SCHEMAS = Path(__file__).parent / "golden" / "schemas"
SLIDE = "layers.0.blocks.0.attn"
TINY: dict[str, Any] = {"embed_dim": 8, "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1), "img_size": 64}
State = dict[str, Tensor]

every_family = pytest.mark.parametrize("family", FAMILIES)
sized_family = pytest.mark.parametrize("family", ["swin", "swin_w4", "pvt"])


def sized(family: str, **options: Any) -> Any:
    """A model with tables that depend on the image size: global or 4x4 windows, or position embeddings."""
    windows = {"swin": 56, "swin_w4": 4}
    more = {"window_size": windows[family]} if family in windows else {}
    return model(family.removesuffix("_w4"), **{**more, **options})


def answers(given: nn.Module, hw: tuple[int, int] = (64, 64)) -> Tensor:
    with torch.inference_mode():
        out: Tensor = given.eval()(images(hw))
    return out


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def unchanged(given: nn.Module, before: State) -> bool:
    return all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def copied(given: nn.Module) -> State:
    return {name: value.clone() for name, value in given.state_dict().items()}


OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "slide_swin_tiny_224": lambda: create_model("slide_swin_tiny"),
    "derived_slide_pvt_small": lambda: create_model(
        "slide_pvt_tiny",
        img_size=64,
        depths=(1, 2, 2, 1),
        embed_dims=(16, 32, 40, 64),
        num_heads=(1, 2, 5, 8),
        mlp_ratios=(8, 8, 4, 4),
        num_classes=10,
    ),
    "swin_small_2stages": lambda: create_model(
        "slide_swin_tiny", embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8), num_classes=10, img_size=64
    ),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes_load_strictly(tmp_path: Path, name: str) -> None:
    """The schema's whole file, index tables and masks included."""
    schema = golden.read_schema(SCHEMAS / f"{name}.json.gz")
    state = {key: torch.full(shape, 0.5, dtype=getattr(torch, dtype)) for key, (shape, dtype) in schema.items()}
    given = OFFICIAL[name]()
    frozen = {key: value for key, value in given.state_dict().items() if key.endswith(".dep_conv.weight")}
    load_official(given, saved(tmp_path / "official.pth", {"model": {**state, **frozen}}))
    assert all((value == 0.5).all() for key, value in given.state_dict().items() if key not in frozen)


def envelope(state: State, kind: str) -> Any:
    computed = {"layers.2.blocks.1.attn_mask": torch.ones(2, 2), "x.relative_position_index": torch.ones(2, 2)}
    return {
        "bare": state,
        "model": {"model": state, "optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 299},
        "parallel": {"model": {f"module.{name}": value for name, value in state.items()}},
        "computed": {"model": {**state, **computed}},
    }[kind]


@pytest.mark.parametrize("kind", ["bare", "model", "parallel", "computed"])
def test_every_envelope_is_opened(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    source, given = model("swin"), KINDS["swin"][0](**{**KINDS["swin"][1], "img_size": 64, "num_classes": 7})
    with caplog.at_level(logging.WARNING):
        report = load_official(given, saved(tmp_path / "w.pth", envelope(source.state_dict(), kind)))
    assert report.fits
    assert caplog.text == ""
    assert torch.equal(answers(given), answers(source))


def test_moving_average_is_taken_on_request(tmp_path: Path) -> None:
    source, other, given = model("pvt"), drawn(model("pvt"), seed=3), model("pvt")
    content = {"model": source.state_dict(), "state_dict_ema": other.state_dict(), "max_accuracy_e": 77.0}
    load_official(given, saved(tmp_path / "w.pth", content), use_ema=True)
    assert torch.equal(answers(given), answers(other))


@every_family
def test_round_trip_through_safetensors_keeps_every_bit(tmp_path: Path, family: str) -> None:
    source, given = model(family), drawn(model(family), seed=5)
    save_safetensors(source, tmp_path / "w.safetensors")
    load_official(given, tmp_path / "w.safetensors")
    assert unchanged(given, copied(source))
    assert torch.equal(answers(given), answers(source))


@every_family
def test_deploy_file_is_written_and_read_again(tmp_path: Path, family: str) -> None:
    source, given = reparameterize(model(family)), reparameterize(drawn(model(family), seed=5).eval())
    save_safetensors(source, tmp_path / "deploy.safetensors")
    load_official(given, tmp_path / "deploy.safetensors")
    assert torch.equal(answers(given), answers(source))


@pytest.mark.parametrize("options", [{"share_kernel": False}, {"rel_pos_bias": False}, {"single_bias": True}])
def test_deploy_file_of_every_form_of_the_layer_is_read_again(tmp_path: Path, options: dict[str, Any]) -> None:
    source, given = (reparameterize(model("swin", slide_options=options).eval()) for _ in range(2))
    drawn(source, seed=4)
    save_safetensors(source, tmp_path / "deploy.safetensors")
    load_official(given, tmp_path / "deploy.safetensors")
    assert torch.equal(answers(given), answers(source))


def test_deploy_weights_in_a_model_with_two_paths_say_reparameterize(tmp_path: Path) -> None:
    source, given = reparameterize(model("swin")), model("swin")
    path = saved(tmp_path / "deploy.pth", source.state_dict())
    message = rf"{SLIDE}: the weights have one path, this model two: call reparameterize\(model\), then load"
    before = copied(given)
    with pytest.raises(UserError, match=rf"deploy.pth: {message}$"):
        load_official(given, path)
    assert unchanged(given, before)
    for strict in (True, False):
        with pytest.raises(UserError, match=f"^{message}$"):
            given.load_state_dict(source.state_dict(), strict=strict)


def test_training_weights_in_a_model_with_one_path_say_to_load_before(tmp_path: Path) -> None:
    source, given = model("swin"), reparameterize(model("swin"))
    path = saved(tmp_path / "w.pth", source.state_dict())
    message = rf"{SLIDE}: the weights have two paths, this model one: load, then call reparameterize\(model\)"
    with pytest.raises(UserError, match=rf"w.pth: {message}$"):
        load_official(given, path)
    with pytest.raises(UserError, match=f"^{message}$"):
        given.load_state_dict(source.state_dict())


def test_weights_of_window_attention_in_a_slide_block_name_the_converter(tmp_path: Path) -> None:
    source, given = model("swin", num_slide_stages=0), model("swin")
    path = saved(tmp_path / "swin.pth", {"model": source.state_dict()})
    message = f"{SLIDE}: these are weights of window attention, .*use leap_slide.convert.from_swin"
    with pytest.raises(UserError, match=f"swin.pth: {message}$"):
        load_official(given, path)
    with pytest.raises(UserError, match=f"^{message}$"):
        given.load_state_dict(source.state_dict())


@pytest.mark.parametrize("merged", [False, True])
def test_weights_of_another_kernel_size_say_both(tmp_path: Path, merged: bool) -> None:
    source, given = model("swin", kernel_size=5), model("swin")
    if merged:
        source, given = reparameterize(source), reparameterize(given)
    path = saved(tmp_path / "w.pth", source.state_dict())
    message = f"{SLIDE}: the weights have kernel_size 5, this model 3: create it so"
    for resize in (False, True):
        with pytest.raises(UserError, match=f"w.pth: {message}$"):
            load_official(given, path, resize=resize)
    with pytest.raises(UserError, match=f"^{message}$"):
        given.load_state_dict(source.state_dict())


def test_fixed_path_that_is_no_pure_shift_is_honoured_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, given = model("swin"), model("swin")
    with torch.no_grad():
        source.get_parameter(f"{SLIDE}.dep_conv.weight").mul_(1.5)
    with caplog.at_level(logging.WARNING):
        load_official(given, saved(tmp_path / "w.pth", source.state_dict()))
    assert caplog.messages == [
        f"{SLIDE}: dep_conv.weight of these weights is not the plain shift; it is taken as it is"
    ]
    assert torch.equal(answers(given), answers(source))
    assert not given.get_parameter(f"{SLIDE}.dep_conv.weight").requires_grad


def test_file_with_two_biases_fits_a_model_with_one(tmp_path: Path) -> None:
    source, given = model("swin"), model("swin", slide_options={"single_bias": True})
    load_official(given, saved(tmp_path / "w.pth", source.state_dict()))
    wanted = answers(source)
    assert (answers(given) - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # the biases are added in another order


SIZES = [(96, 96), (64, 128)]


@sized_family
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_resizing_while_loading_equals_setting_the_size(tmp_path: Path, family: str, size: tuple[int, int]) -> None:
    """Every load for fine-tuning raises in the release, since the slide table has six dimensions."""
    source, given = sized(family), sized(family, img_size=size)
    load_official(given, saved(tmp_path / "w.pth", {"model": source.state_dict()}), resize=True)
    wanted = copied(source)
    source.set_input_size(size)
    assert torch.equal(answers(given, size), answers(source, size))
    tables = [name for name, value in wanted.items() if value.ndim == 6]
    assert len(tables) == 2
    assert all(torch.equal(given.get_parameter(name), wanted[name]) for name in tables)


@pytest.mark.parametrize("family", ["swin", "pvt"])
def test_another_size_is_refused_without_resize_and_says_how(tmp_path: Path, family: str) -> None:
    path = saved(tmp_path / "w.pth", sized(family, img_size=96).state_dict())
    with pytest.raises(UserError, match=r"It is for another image size: pass resize=True$"):
        load_official(sized(family), path)


def test_rectangular_files_are_resized_by_their_source_size(tmp_path: Path) -> None:
    source, given = sized("pvt", img_size=(64, 128)), sized("pvt", img_size=96)
    load_official(given, saved(tmp_path / "w.pth", source.state_dict()), resize=True, source_size=(64, 128))
    source.set_input_size(96)
    assert torch.equal(answers(given, (96, 96)), answers(source, (96, 96)))


def test_window_tables_are_resampled_bicubically() -> None:
    source, given = sized("swin"), sized("swin", img_size=96)
    name = "layers.2.blocks.1.attn.relative_position_bias_table"  # windows of 4 see the whole map, and of 6
    table = source.get_parameter(name).unflatten(0, (7, 7)).permute(2, 0, 1)[None]
    wanted = F.interpolate(table, (11, 11), mode="bicubic", align_corners=False)[0].flatten(1).T
    assert torch.equal(resize_tables(given, source.state_dict())[name], wanted)


def test_kernel_of_patches_of_another_size_is_resampled_bicubically(tmp_path: Path) -> None:
    source, given = model("swin"), model("swin")
    kernel = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    path = saved(tmp_path / "w.pth", {**source.state_dict(), "patch_embed.proj.weight": kernel})
    with pytest.raises(UserError, match=r"mis-shaped: patch_embed\.proj\.weight"):
        load_official(given, path)
    load_official(given, path, resize=True)
    wanted = F.interpolate(kernel, (4, 4), mode="bicubic", align_corners=False)
    assert torch.equal(given.patch_embed.proj.weight, wanted)


@every_family
def test_file_of_other_classes_leaves_a_new_head_at_zero(tmp_path: Path, family: str) -> None:
    path = saved(tmp_path / "w.pth", model(family).state_dict())
    given = KINDS[family][0](**{**KINDS[family][1], "img_size": 64, "num_classes": 3})
    with pytest.raises(UserError, match=r"It is for other classes: pass new_head=True$"):
        load_official(given, path)
    load_official(given, path, new_head=True)
    assert not given.get_parameter("head.weight").any()


@pytest.mark.parametrize("name", ["slide_swin_tiny", "slide_pvt_tiny", "slide_pvt_v2_b1", "slide_cswin_tiny"])
def test_variant_is_recognised_with_one_path_or_two(name: str) -> None:
    with torch.device("meta"):
        state = create_model(name).state_dict()
        merged = {key.replace("dep_conv1", "dep_conv_merged"): x for key, x in state.items() if ".dep_conv." not in key}
    assert variants_of(state) == variants_of(merged) == [name]


def test_variants_with_and_without_small_windows_are_told_apart_where_tables_tell() -> None:
    with torch.device("meta"):
        other_classes = create_model("slide_swin_tiny_w7", num_classes=5).state_dict()
        other_size = create_model("slide_swin_tiny", img_size=256).state_dict()
    assert variants_of(other_classes) == ["slide_swin_tiny_w7"]
    assert variants_of(other_size) == ["slide_swin_tiny", "slide_swin_tiny_w7"]


def test_file_of_another_variant_names_it(tmp_path: Path) -> None:
    save_safetensors(create_model("slide_pvt_tiny"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"does not fit SlideSwin: .*It fits slide_pvt_tiny$"):
        load_official(model("swin"), tmp_path / "w.safetensors")


def test_file_that_fits_nothing_names_the_converter(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(UserError, match=r"It fits no variant of this package; .*leap_slide.convert.from_swin$"):
        load_official(model("swin"), path)


@pytest.mark.parametrize("argument", ["checkpoint", "pretrained"])
def test_model_is_created_with_the_weights_of_a_file(tmp_path: Path, argument: str) -> None:
    source = drawn(create_model("slide_swin_tiny", **TINY))
    given: Any = {argument: saved(tmp_path / "w.pth", {"model": source.state_dict()})}
    assert torch.equal(answers(create_model("slide_swin_tiny", **TINY, **given)), answers(source))


def test_model_is_created_at_another_size_with_another_head(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", drawn(create_model("slide_swin_tiny", **TINY)).state_dict())
    other = {**TINY, "img_size": (96, 128), "num_classes": 3}
    with pytest.raises(UserError, match="pass resize=True"):
        create_model("slide_swin_tiny", checkpoint=path, **other)
    given: Any = create_model("slide_swin_tiny", checkpoint=path, resize=True, **other)
    assert given.head.weight.shape[0] == 3
    assert given.img_size == (96, 128)


@pytest.mark.parametrize("merged", [False, True])
def test_feature_pyramid_is_created_with_the_weights_of_a_file(tmp_path: Path, merged: bool) -> None:
    source: Any = drawn(create_model("slide_pvt_v2_b1", embed_dims=(8, 8, 16, 16), num_heads=(1, 2, 2, 2))).eval()
    if merged:
        reparameterize(source)
    path = saved(tmp_path / "w.pth", source.state_dict())
    options: dict[str, Any] = {"embed_dims": (8, 8, 16, 16), "num_heads": (1, 2, 2, 2), "out_indices": (1, 3)}
    pyramid = create_model("slide_pvt_v2_b1", checkpoint=path, features_only=True, **options).eval()
    source.set_input_size(64)
    with torch.inference_mode():
        wanted = source.forward_intermediates(images(), indices=(1, 3), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(pyramid(images()), wanted, strict=True))


def test_model_is_created_with_one_path_for_a_deploy_file(tmp_path: Path) -> None:
    source = reparameterize(drawn(create_model("slide_swin_tiny", **TINY)).eval())
    save_safetensors(source, tmp_path / "deploy.safetensors")
    given = create_model("slide_swin_tiny", checkpoint=tmp_path / "deploy.safetensors", **TINY)
    assert given.reparameterized
    assert torch.equal(answers(given), answers(source))


def test_weights_to_download_do_not_exist_and_the_error_says_what_to_give() -> None:
    message = (
        r"slide_swin_tiny has no weights to download: nobody has published any; .*checkpoint='slide_swin_tiny\.saf"
    )
    with pytest.raises(UserError, match=message):
        create_model("slide_swin_tiny", pretrained=True)


def test_unknown_name_gets_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"model 'slide_swin_tinny' is unknown: did you mean .*slide_swin_tiny"):
        create_model("slide_swin_tinny")


def test_unknown_option_is_named() -> None:
    with pytest.raises(UserError, match=r"slide_swin_tiny does not take .*window.*unexpected keyword"):
        create_model("slide_swin_tiny", window=7)


@pytest.mark.parametrize("name", ["slide_swin_tiny", "slide_pvt_v2_b4", "slide_cswin_base", "slide_nat_mini"])
def test_parameters_of_variants_are_counted(name: str) -> None:
    with torch.device("meta"):
        assert sum(value.numel() for value in create_model(name).parameters()) == VARIANTS[name].parameters


def test_every_registered_variant_is_in_the_table() -> None:
    assert set(VARIANTS) == set(timm.list_models("slide_*"))

"""Files: the authors' in every envelope, other sizes and heads, refusals that say what fits, and this package's own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_flatten import (
    FlattenCSWin,
    FlattenDeiT,
    FlattenPVT,
    FlattenPVTv2,
    FlattenSwin,
    create_model,
    load_official,
    save_safetensors,
)
from leap_flatten.checkpoints import read_official, resize_tables, variants_of
from leap_shared.errors import UserError
from leap_shared.testing import golden

SCHEMAS = Path(__file__).parent / "golden" / "schemas"
SMALL = {"depths": (1, 1, 2, 1), "num_classes": 5, "img_size": 64}
Make = Callable[..., Any]
State = dict[str, Tensor]


def swin(**changes: Any) -> FlattenSwin:
    return FlattenSwin(**{"embed_dim": 8, "num_heads": (1, 2, 4, 8), **SMALL, **changes})


def pvt(**changes: Any) -> FlattenPVT:
    return FlattenPVT(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def pvt_v2(**changes: Any) -> FlattenPVTv2:
    return FlattenPVTv2(**{"embed_dims": (8, 16, 20, 32), "mlp_ratios": (2, 2, 2, 2), **SMALL, **changes})


def cswin(**changes: Any) -> FlattenCSWin:
    return FlattenCSWin(**{"embed_dim": 8, "num_heads": (2, 4, 8, 16), "split_sizes": (1, 2, 2, 2), **SMALL, **changes})


def deit(**changes: Any) -> FlattenDeiT:
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 64, "num_classes": 5}
    return FlattenDeiT(**{**options, **changes})


FAMILIES: list[Make] = [swin, pvt, pvt_v2, cswin, deit]
every_family = pytest.mark.parametrize("make", FAMILIES)


def drawn(model: nn.Module, seed: int = 0) -> Any:
    """The model in evaluation mode with all parameters drawn anew, tables and scales too."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data = torch.randn(value.shape, generator=generator) * 0.2
    return model.eval()


def logits(model: nn.Module, size: tuple[int, int] = (64, 64)) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)))
    return out


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


OFFICIAL: dict[str, Callable[[], nn.Module]] = {
    "flatten_swin_tiny_224": lambda: create_model("flatten_swin_tiny"),
    "flatten_pvt_tiny_224": lambda: create_model("flatten_pvt_tiny"),
    "swin_small_LLSS": lambda: swin(depths=(2, 2, 2, 1), embed_dim=16, num_classes=10, window_size=16),
    "cswin_reduced": lambda: cswin(img_size=32, embed_dim=16, split_sizes=(1, 2, 1, 1), num_classes=10),
    "pvt_v2_reduced_dev": lambda: FlattenPVTv2(
        depths=(1, 1, 1, 1), embed_dims=(16, 32, 40, 64), img_size=64, num_classes=10, la_sr_ratios="2111"
    ),
    "derived_deit_small": lambda: deit(embed_dim=48, num_heads=3, patch_size=8, img_size=32, num_classes=10),
}


@pytest.mark.golden
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_names_and_shapes_load_strictly(tmp_path: Path, name: str) -> None:
    """The schema's whole file, index tables and masks included."""
    schema = golden.read_schema(SCHEMAS / f"{name}.json.gz")
    state = {key: torch.full(shape, 0.5, dtype=getattr(torch, dtype)) for key, (shape, dtype) in schema.items()}
    model = OFFICIAL[name]()
    report = load_official(model, saved(tmp_path / "official.pth", {"model": state}))
    assert report.fits
    assert all((value == 0.5).all() for value in model.state_dict().values())


class Config(dict[str, object]):
    """Stands for the authors' configuration object; unpickling one runs this."""

    executed = False

    def __setstate__(self, state: object) -> None:
        Config.executed = True

    def __setitem__(self, key: str, value: object) -> None:
        Config.executed = True


def envelope(state: State, kind: str) -> Any:
    other = {name: value + 1 for name, value in state.items()}
    computed = {"layers.0.blocks.0.attn_mask": torch.ones(2, 2), "x.relative_position_index": torch.ones(2, 2)}
    return {
        "bare": state,
        "model": {"model": state, "optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 299},
        "state_dict": {"state_dict": state, "arch": "flatten_swin_tiny"},
        "parallel": {"model": {f"module.{name}": value for name, value in state.items()}},
        "with average": {"model": state, "state_dict_ema": other, "max_accuracy_e": 83.1},
        "computed": {"model": {**state, **computed}},
    }[kind]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("kind", ["bare", "model", "state_dict", "parallel", "with average", "computed"])
def test_every_envelope_is_opened(tmp_path: Path, kind: str, legacy: bool) -> None:
    source, model = drawn(swin()), swin().eval()
    content = envelope(source.state_dict(), kind)
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=not legacy)
    load_official(model, path)
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_pickled_configuration_is_left_out_and_never_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, legacy: bool
) -> None:
    source, model, config = drawn(pvt()), pvt().eval(), Config()
    dict.__setitem__(config, "MODEL", {"NAME": "flatten_pvt"})
    config.frozen = True  # type: ignore[attr-defined]  # an attribute makes pickle call __setstate__
    content = {"model": source.state_dict(), "config": config}
    path = saved(tmp_path / "w.pth", content, _use_new_zipfile_serialization=not legacy)
    Config.executed = False
    load_official(model, path)
    assert not Config.executed
    assert "Config" in caplog.text
    assert torch.equal(logits(model), logits(source))


def test_moving_average_is_taken_on_request(tmp_path: Path) -> None:
    source, model = drawn(swin()), swin()
    path = saved(tmp_path / "w.pth", envelope(source.state_dict(), "with average"))
    load_official(model, path, use_ema=True)
    assert torch.equal(model.norm.weight, source.norm.weight + 1)


def test_file_without_a_moving_average_says_so(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"model": swin().state_dict(), "epoch": 3})
    with pytest.raises(UserError, match=r"holds no moving average.*model, epoch"):
        load_official(swin(), path, use_ema=True)


@every_family
def test_round_trip_through_safetensors_keeps_every_bit(tmp_path: Path, make: Make) -> None:
    source, model = drawn(make()), make().eval()
    save_safetensors(source, tmp_path / "w.safetensors")
    load_official(model, tmp_path / "w.safetensors")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
    assert torch.equal(logits(model), logits(source))


def test_saving_into_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*w\.safetensors"):
        save_safetensors(swin(), tmp_path / "missing" / "w.safetensors")


@every_family
def test_another_size_is_refused_without_resize_and_says_how(tmp_path: Path, make: Make) -> None:
    path = saved(tmp_path / "w.pth", drawn(make(img_size=96)).state_dict())
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"It is for another image size: pass resize=True$"):
        load_official(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SIZES = [(96, 96), (64, 128), (160, 96)]


@every_family
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_resizing_while_loading_equals_setting_the_size(tmp_path: Path, make: Make, size: tuple[int, int]) -> None:
    source, model = drawn(make()), make(img_size=size).eval()
    load_official(model, saved(tmp_path / "w.pth", source.state_dict()), resize=True)
    source.set_input_size(size)
    assert torch.equal(logits(model, size), logits(source, size))


@every_family
@pytest.mark.parametrize("size", SIZES[1:], ids=lambda size: f"{size[0]}x{size[1]}")
def test_rectangular_files_are_resized_by_their_source_size(tmp_path: Path, make: Make, size: tuple[int, int]) -> None:
    source, model = drawn(make(img_size=size)), make(img_size=96).eval()
    load_official(model, saved(tmp_path / "w.pth", source.state_dict()), resize=True, source_size=size)
    source.set_input_size(96)
    assert torch.equal(logits(model, (96, 96)), logits(source, (96, 96)))


def test_rectangular_file_without_its_size_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", drawn(pvt(img_size=(64, 96))).state_dict())
    with pytest.raises(UserError, match=r"pos_embed1 has 384 rows.*pass source_size=\(H, W\)"):
        load_official(pvt(img_size=128), path, resize=True)


def bicubic(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str = "bicubic") -> Tensor:
    image = table.unflatten(1, old).permute(0, 3, 1, 2)
    return F.interpolate(image, new, mode=mode, align_corners=False).flatten(2).transpose(1, 2)


def test_tables_of_swin_are_resampled_bicubically() -> None:
    source, model = drawn(swin(img_size=96)), swin(img_size=128)
    resized = resize_tables(model, source.state_dict())
    name = "layers.1.blocks.0.attn.positional_encoding"
    assert torch.equal(resized[name], bicubic(source.get_parameter(name), (12, 12), (16, 16)))
    name = "layers.2.blocks.0.attn.relative_position_bias_table"  # windows of 6, and of 7
    assert torch.equal(resized[name], bicubic(source.get_parameter(name)[None], (11, 11), (13, 13))[0])


def test_absolute_embedding_of_swin_is_resampled_bicubically() -> None:
    source, model = drawn(swin(ape=True)), swin(ape=True, img_size=128)
    table = resize_tables(model, source.state_dict())["absolute_pos_embed"]
    assert torch.equal(table, bicubic(source.absolute_pos_embed, (16, 16), (32, 32)))


def test_position_embeddings_of_pvt_are_resampled_bilinearly_and_encodings_bicubically() -> None:
    source, model = drawn(pvt()), pvt(img_size=96)
    resized = resize_tables(model, source.state_dict())
    assert torch.equal(resized["pos_embed3"], bicubic(source.pos_embed3, (4, 4), (6, 6), "bilinear"))
    name = "block3.0.attn.positional_encoding"
    assert torch.equal(resized[name], bicubic(source.get_parameter(name), (4, 4), (6, 6)))


def test_encodings_of_reduced_keys_are_resampled_on_their_own_grid() -> None:
    source, model = drawn(pvt(la_sr_ratios="2111")), pvt(la_sr_ratios="2111", img_size=96)
    name = "block1.0.attn.positional_encoding"
    want = bicubic(source.get_parameter(name), (8, 8), (12, 12))
    assert torch.equal(resize_tables(model, source.state_dict())[name], want)


def test_class_token_rows_of_deit_are_kept() -> None:
    source, model = drawn(deit()), deit(img_size=96)
    resized = resize_tables(model, source.state_dict())
    for name in ("pos_embed", "blocks.1.attn.positional_encoding"):
        table = source.get_parameter(name)
        assert torch.equal(resized[name][:, 0], table[:, 0])
        assert torch.equal(resized[name][:, 1:], bicubic(table[:, 1:], (4, 4), (6, 6)))


def test_stripes_of_cswin_keep_their_width() -> None:
    options = {"la_split_size": "2-2-2-2", "attn_type": "LLLL"}
    source, model = drawn(cswin(**options)), cswin(img_size=96, **options)
    resized = resize_tables(model, source.state_dict())
    for branch, old, new in ((0, (16, 2), (24, 2)), (1, (2, 16), (2, 24))):
        name = f"stage1.0.attns.{branch}.positional_encoding"
        assert torch.equal(resized[name], bicubic(source.get_parameter(name), old, new))


@pytest.mark.parametrize(("old", "new"), [(64, 224), (224, 64)])
def test_branch_of_cswin_over_a_small_map_and_the_two_of_a_large_one_are_the_same_kernels(
    tmp_path: Path, old: int, new: int
) -> None:
    """Stripes of 7 cover the 4x4 tokens of stage 3 at 64 pixels, and do not cover its 14x14 at 224."""
    source, model = (drawn(cswin(img_size=size, split_sizes=(1, 2, 7, 7))) for size in (old, new))
    assert source.state_dict().keys() != model.state_dict().keys()
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(UserError, match="for another image size: pass resize=True"):
        load_official(model, path)
    load_official(model, path, resize=True)
    source.set_input_size(new)
    want = logits(source, (new, new))
    assert (logits(model, (new, new)) - want).abs().max() <= 1e-5 * want.abs().max()


@every_family
def test_file_of_other_classes_leaves_a_new_head_at_zero(
    tmp_path: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = drawn(make()), make(num_classes=3)
    path = saved(tmp_path / "w.pth", source.state_dict())
    with pytest.raises(UserError, match=r"It is for other classes: pass new_head=True$"):
        load_official(model, path)
    load_official(model, path, new_head=True)
    assert not model.head.weight.any()
    assert not model.head.bias.any()
    assert "does not fit 3 classes, so the head starts at zero" in caplog.text
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval().forward_features(image), source.forward_features(image))


def test_fitting_head_is_loaded_also_where_a_new_one_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, model = drawn(swin()), swin()
    load_official(model, saved(tmp_path / "w.pth", source.state_dict()), new_head=True)
    assert torch.equal(model.head.weight, source.head.weight)
    assert "head" not in caplog.text


def test_model_without_head_takes_a_file_with_one(tmp_path: Path) -> None:
    source, model = drawn(swin()), swin(num_classes=0).eval()
    load_official(model, saved(tmp_path / "w.pth", source.state_dict()), new_head=True)
    source.reset_classifier(0)
    assert torch.equal(logits(model), logits(source))


def test_size_and_classes_of_another_kind_are_named_together(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", swin(num_classes=3, img_size=96).state_dict())
    message = "another image size: pass resize=True and for other classes: pass new_head=True"
    with pytest.raises(UserError, match=message):
        load_official(swin(), path)


def schema_state(name: str) -> State:
    schema = golden.read_schema(SCHEMAS / f"{name}.json.gz")
    return {key: torch.zeros(shape) for key, (shape, dtype) in schema.items() if "float" in dtype}


@pytest.mark.golden
def test_file_of_another_variant_names_the_first_misfit_and_the_variant(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"model": schema_state("flatten_swin_tiny_224")})
    with pytest.raises(UserError) as refused:
        load_official(pvt(), path)
    message = str(refused.value)
    assert message.startswith(f"{path}: the checkpoint does not fit FlattenPVT: ")
    assert "missing: pos_embed1" in message
    assert "unexpected: patch_embed.proj.weight" in message
    assert message.endswith("It fits flatten_swin_tiny")


@pytest.mark.parametrize("name", [f"flatten_{one}" for one in ("swin_tiny", "pvt_tiny", "pvt_v2_b0", "cswin_tiny")])
def test_variant_is_recognised_but_for_head_and_size(name: str) -> None:
    with torch.device("meta"):
        exact, other = create_model(name), create_model(name, num_classes=10, img_size=256)
    assert variants_of(exact.state_dict()) == [name]
    assert variants_of(other.state_dict()) == [name]


def test_weights_of_other_widths_are_no_variants() -> None:
    with torch.device("meta"):
        state = create_model("flatten_deit_tiny").state_dict()
        assert variants_of(state) == ["flatten_deit_tiny"]
        assert variants_of({**state, "norm.weight": torch.zeros(100)}) == []


def test_file_that_fits_no_variant_is_said_to(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(UserError, match="It fits no variant of this package: is it one of the authors' classification"):
        load_official(swin(), path)


@pytest.mark.parametrize("change", ["one missing", "one more", "one of another shape"])
def test_nothing_is_loaded_where_one_entry_does_not_fit(tmp_path: Path, change: str) -> None:
    source, model = drawn(swin()), swin()
    state = source.state_dict()
    if change == "one missing":
        del state["norm.weight"]
    elif change == "one more":
        state["norm.gain"] = torch.zeros(3)
    else:
        state["norm.weight"] = torch.zeros(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"norm\.(weight|gain)"):
        load_official(model, saved(tmp_path / "w.pth", state), resize=True, new_head=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


FILES = {
    "is no checkpoint but a PNG picture": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "is no checkpoint but text": b"epoch,accuracy\n1,82.1\n",
    "is no checkpoint but an HTML page": b"<!DOCTYPE html><html></html>",
    "is empty: download it again": b"",
}


@pytest.mark.parametrize("message", FILES)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, message: str) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(FILES[message])
    with pytest.raises(UserError) as refused:
        load_official(swin(), path)
    assert message in str(refused.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*nothing\.pth"):
        load_official(swin(), tmp_path / "nothing.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file_is_one_clear_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        saved(path, {"model": swin().state_dict()})
    else:
        save_safetensors(swin(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="download it again") as refused:
        load_official(swin(), path)
    assert "\n" not in str(refused.value)


def test_file_without_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tensors"):
        load_official(swin(), saved(tmp_path / "w.pth", {"epoch": 1}))


def test_computed_tables_and_masks_are_not_read(tmp_path: Path) -> None:
    state = {"norm.weight": torch.ones(2), "layers.2.blocks.1.attn_mask": torch.ones(1)}
    state["layers.2.blocks.0.attn.relative_position_index"] = torch.ones(1)
    assert list(read_official(saved(tmp_path / "w.pth", state))) == ["norm.weight"]


TINY = {"embed_dim": 8, "num_heads": (1, 2, 4, 8), "depths": (1, 1, 1, 1), "img_size": 64}


@pytest.mark.parametrize("argument", ["checkpoint", "pretrained"])
@pytest.mark.parametrize("as_text", [False, True])
def test_model_is_created_with_the_weights_of_a_file(tmp_path: Path, argument: str, as_text: bool) -> None:
    source = drawn(create_model("flatten_swin_tiny", **TINY))
    path = saved(tmp_path / "w.pth", {"model": source.state_dict()})
    given: Any = {argument: str(path) if as_text else path}
    model = create_model("flatten_swin_tiny", **TINY, **given).eval()
    assert torch.equal(logits(model), logits(source))


def test_model_is_created_at_another_size_with_another_head(tmp_path: Path) -> None:
    source = drawn(create_model("flatten_swin_tiny", **TINY))
    path = saved(tmp_path / "w.pth", source.state_dict())
    other = {**TINY, "img_size": (96, 64), "num_classes": 3}
    with pytest.raises(UserError, match="pass resize=True"):
        create_model("flatten_swin_tiny", checkpoint=path, **other)
    model = create_model("flatten_swin_tiny", checkpoint=path, resize=True, **other)
    assert model.head.weight.shape[0] == 3
    assert model.img_size == (96, 64)


@pytest.mark.parametrize("missing", [("head.bias",), ("head.weight", "head.bias")])
def test_file_that_lacks_its_head_is_refused_though_classes_are_named(tmp_path: Path, missing: tuple[str, ...]) -> None:
    state = drawn(create_model("flatten_swin_tiny", **TINY)).state_dict()
    path = saved(tmp_path / "w.pth", {name: value for name, value in state.items() if name not in missing})
    with pytest.raises(UserError, match="missing: head"):
        create_model("flatten_swin_tiny", checkpoint=path, num_classes=7, **TINY)


def test_model_is_created_without_head_from_a_file_with_one(tmp_path: Path) -> None:
    source = drawn(create_model("flatten_swin_tiny", **TINY))
    path = saved(tmp_path / "w.pth", source.state_dict())
    model = create_model("flatten_swin_tiny", checkpoint=path, num_classes=0, **TINY).eval()
    source.reset_classifier(0)
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("indices", [(0, 1, 2, 3), (1, 2)])
def test_feature_pyramid_is_created_with_the_weights_of_a_file(tmp_path: Path, indices: tuple[int, ...]) -> None:
    source = drawn(create_model("flatten_swin_tiny", **TINY))
    path = saved(tmp_path / "w.pth", source.state_dict())
    options = {"features_only": True, "out_indices": indices, **TINY}
    pyramid = create_model("flatten_swin_tiny", checkpoint=path, **options).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = source.forward_intermediates(image, indices=indices, intermediates_only=True)
        got = pyramid(image)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_weights_to_download_do_not_exist_and_the_error_says_what_to_give() -> None:
    with pytest.raises(UserError, match=r"flatten_swin_tiny has no weights to download: give the path of a file"):
        create_model("flatten_swin_tiny", pretrained=True)


def test_unknown_option_is_named() -> None:
    with pytest.raises(UserError, match=r"flatten_swin_tiny does not take .*window.*unexpected keyword"):
        create_model("flatten_swin_tiny", window=7)


def test_unknown_name_gets_the_nearest_names() -> None:
    with pytest.raises(UserError, match=r"model 'flatten_swin_tinny' is unknown: did you mean .*flatten_swin_tiny"):
        create_model("flatten_swin_tinny")


def test_loading_logs_nothing_where_all_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "w.pth", {"model": drawn(swin()).state_dict()})
    with caplog.at_level(logging.WARNING):
        load_official(swin(), path)
    assert caplog.text == ""

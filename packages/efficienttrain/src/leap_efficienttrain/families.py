"""The families of timm, whether they can change their input size in the middle of a training, and by what means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from torch import nn

from leap_efficienttrain.tables import Size, as_size, scaled_window, shown
from leap_shared.errors import UserError
from leap_shared.vision.bodies import Body

__all__ = ["FAMILIES", "Family", "How", "Pair", "family_of", "multiple_of", "rebuilt_pair", "resized_pair", "size_of"]

How = Literal["any size", "in place", "resample", "refused"]
Pair = tuple[nn.Module, nn.Module]


@dataclass(frozen=True)
class Family:
    """Models of timm that change their input size by the same means.

    Attributes:
        name: of the family.
        how: "any size": as built, nothing depends on the size. "in place": parameters, moments and moving averages
            move together. "resample": the same, but only if asked for, because weights are tied to one grid.
            "refused": not possible.
        files: files of `timm.models` that define it.
        multiple: of which height and width must be multiples; 0 means the side of the model's patches.
        examples: names of models.
        reason: why not, where `how` is "refused" or "resample".
        windowed: whether windows grow with the size, as Swin's do.
    """

    name: str
    how: How
    files: tuple[str, ...]
    multiple: int
    examples: tuple[str, ...]
    reason: str = ""
    windowed: bool = False

    @property
    def requirement(self) -> str:
        """What the input size must be, in words."""
        if self.how == "refused":
            return "no other size"
        if self.windowed:
            return "a multiple of 8 patches (32)"
        return f"a multiple of {self.multiple or 'the patch size'}" if self.multiple != 1 else "any"


def _any(name: str, file: str, *examples: str) -> Family:
    return Family(name, "any size", (file,), 1, examples)


def _in_place(name: str, multiple: int, file: str, *examples: str, windowed: bool = False) -> Family:
    return Family(name, "in place", (file,), multiple, examples, windowed=windowed)


_MIXING = "its layers mix tokens by matrices with one row and one column per place"
_OFFSETS = "it learns one bias per offset of a fixed map"

FAMILIES: tuple[Family, ...] = (
    _in_place("vit, deit, deit3", 0, "vision_transformer", "vit_tiny_patch16_224", "deit3_small_patch16_224"),
    _in_place("deit distilled", 0, "deit", "deit_tiny_distilled_patch16_224"),
    _in_place("beit", 0, "beit", "beit_base_patch16_224"),
    _in_place("eva, eva02", 0, "eva", "eva02_tiny_patch14_224"),
    _in_place("vit_relpos", 0, "vision_transformer_relpos", "vit_relpos_small_patch16_224"),
    _in_place("swin", 0, "swin_transformer", "swin_tiny_patch4_window7_224", windowed=True),
    _in_place("swinv2", 0, "swin_transformer_v2", "swinv2_tiny_window8_256", windowed=True),
    _in_place("swinv2_cr", 0, "swin_transformer_v2_cr", "swinv2_cr_tiny_224", windowed=True),
    _in_place("maxvit, coatnet", 32, "maxxvit", "maxvit_tiny_tf_224", "coatnet_nano_rw_224"),
    _in_place("efficientvit_m", 16, "efficientvit_msra", "efficientvit_m0"),
    _in_place("cait", 0, "cait", "cait_xxs24_224"),
    _in_place("hiera", 32, "hiera", "hiera_tiny_224"),
    _in_place("nest", 16, "nest", "nest_tiny"),
    _in_place("volo", 16, "volo", "volo_d1_224"),
    _in_place("tnt", 16, "tnt", "tnt_s_patch16_224"),
    _in_place("coat", 32, "coat", "coat_tiny"),
    _in_place("convit", 0, "convit", "convit_tiny"),
    _in_place("visformer", 32, "visformer", "visformer_tiny"),
    Family("levit", "resample", ("levit",), 16, ("levit_128s",), _OFFSETS),
    Family("pit", "resample", ("pit",), 1, ("pit_ti_224",), "it pools position embeddings of a fixed map"),
    Family("efficientformerv2", "resample", ("efficientformer_v2",), 32, ("efficientformerv2_s0",), _OFFSETS),
    Family("mixer, resmlp, gmlp", "refused", ("mlp_mixer",), 1, ("mixer_s32_224", "resmlp_12_224"), _MIXING),
    Family("efficientformer", "refused", ("efficientformer",), 1, ("efficientformer_l1",), _OFFSETS),
    _any("resnet", "resnet", "resnet18"),
    _any("regnet", "regnet", "regnetx_002"),
    _any("efficientnet", "efficientnet", "efficientnet_b0"),
    _any("mobilenetv3, mobilenetv4", "mobilenetv3", "mobilenetv3_small_050", "mobilenetv4_conv_small"),
    _any("convnext, convnextv2", "convnext", "convnext_atto", "convnextv2_atto"),
    _any("caformer, poolformer", "metaformer", "caformer_s18", "poolformer_s12"),
    _any("pvt_v2", "pvt_v2", "pvt_v2_b0"),
    _any("xcit", "xcit", "xcit_nano_12_p16_224"),
    _any("twins", "twins", "twins_svt_small"),
    _any("davit", "davit", "davit_tiny"),
    _any("focalnet", "focalnet", "focalnet_tiny_srf"),
    _any("crossvit", "crossvit", "crossvit_tiny_240"),
    _any("efficientvit_b", "efficientvit_mit", "efficientvit_b0"),
    _any("fastvit", "fastvit", "fastvit_t8"),
    _any("mvitv2", "mvitv2", "mvitv2_tiny"),
    _any("edgenext", "edgenext", "edgenext_xx_small"),
    _any("mobilevit", "byobnet", "mobilevit_xxs", "mobilevitv2_050"),
    _any("tiny_vit", "tiny_vit", "tiny_vit_5m_224"),
    _any("nextvit", "nextvit", "nextvit_small"),
    _any("convmixer", "convmixer", "convmixer_768_32"),
    _any("repvit", "repvit", "repvit_m0_9"),
    _any("starnet", "starnet", "starnet_s1"),
    _any("inception_next", "inception_next", "inception_next_atto"),
    _any("ghostnet", "ghostnet", "ghostnet_050"),
    _any("sequencer2d", "sequencer", "sequencer2d_s"),
    _any("rdnet", "rdnet", "rdnet_tiny"),
    _any("mambaout", "mambaout", "mambaout_femto"),
    _any("swiftformer", "swiftformer", "swiftformer_xs"),
    _any("shvit", "shvit", "shvit_s1"),
    _any("vgg", "vgg", "vgg11"),
    _any("densenet", "densenet", "densenet121"),
)

_BODY_MULTIPLE = 32
_BY_FILE = {file: family for family in FAMILIES for file in family.files}


def family_of(model: nn.Module) -> Family | None:
    """The family of a whole model of timm, or of a class derived from one; None for everything else."""
    if not hasattr(model, "forward_features"):
        return None
    files = (kind.__module__.removeprefix("timm.models.") for kind in type(model).__mro__)
    return next((_BY_FILE[file] for file in files if file in _BY_FILE), None)


def multiple_of(model: nn.Module, family: Family | None) -> int:
    """Of which height and width of the input must be multiples."""
    if isinstance(model, Body):
        return _BODY_MULTIPLE
    if family is None or family.multiple:
        return family.multiple if family else 1
    return _patch(model) << (len(_stages(model)) - 1) if family.windowed else _patch(model)


def _patch(model: nn.Module) -> int:
    embedding: Any = model.patch_embed
    patch: Any = embedding.feat_ratio() if hasattr(embedding, "feat_ratio") else embedding.patch_size
    return patch if isinstance(patch, int) else int(max(patch))


def size_of(model: nn.Module) -> Size | None:
    """Input size that a model is set to, as far as it tells."""
    told = [getattr(place, "img_size", None) for place in (getattr(model, "patch_embed", None), model)]
    told.append(getattr(model, "_traits", {}).get("img_size"))
    told += [(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0,))[1:]]
    sizes = (size for size in told if isinstance(size, int) or (isinstance(size, list | tuple) and len(size) == 2))
    return next((as_size(size if isinstance(size, int) else (size[0], size[1])) for size in sizes), None)


def resized_pair(model: nn.Module, family: Family | None, old: Size, new: Size) -> Pair:
    """A model at its size and at another one, for comparison: neither has to have the right weights.

    A copy is resized by the model's own `set_input_size`, which replaces parameters (in timm); where there is none,
    the factory of timm makes fresh models of both sizes.

    Raises:
        UserError: the model refuses the size, or the factory does not make the same model.
    """
    if not callable(getattr(model, "set_input_size", None)):
        return rebuilt_pair(model, lambda size: _fresh(model, size), old, new)
    hooks = {id(value): value for part in model.modules() for name, value in vars(part).items() if "_hooks" in name}
    resized: Any = copy.deepcopy(model, hooks)  # hooks may be methods of whole trainers
    options = {"window_size": _windows(model, old, new)} if family and family.windowed else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm resamples the copy's tables by its own rule, which nobody will see
            resized.set_input_size(new if family or new[0] != new[1] else new[0], **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        refusal = f"{type(model).__name__}.set_input_size refuses input size {shown(new)}: {error}"
        raise UserError(refusal) from error
    return model, resized


def rebuilt_pair(model: nn.Module, build: Callable[[Size], nn.Module], old: Size, new: Size) -> Pair:
    """Fresh models of both sizes; the global random numbers stay as they are.

    Raises:
        UserError: `build` refuses a size, or the parameters of its model of the old size are not those of `model`.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        try:
            pair = build(old), build(new)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{type(model).__name__} cannot be made for input size {shown(new)}: {error}") from error
    expected, shapes = ({name: p.shape for name, p in each.named_parameters()} for each in (model, pair[0]))
    if shapes != expected:
        name = min(expected.items() ^ shapes.items())[0]
        raise UserError(
            f"a fresh {type(model).__name__} of input size {shown(old)} differs from this model, first in {name}: give "
            "flexible the model's present size, or rebuild=, a function that makes the model for a size"
        )
    return pair


def _fresh(model: nn.Module, size: Size) -> nn.Module:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture")
    if not name or not timm.is_model(name):
        raise UserError(
            f"{type(model).__name__} does not say by which name timm makes it, and it has to be made again for another "
            "input size: give flexible rebuild=, a function that makes the model for a size"
        )
    given = {key: getattr(model, key) for key in ("num_classes", "in_chans") if hasattr(model, key)}
    remembered = {**getattr(model, "_model_args", {}), **given}
    fresh: nn.Module = timm.create_model(name, **{**remembered, "img_size": size[0] if size[0] == size[1] else size})
    return fresh


def _stages(model: Any) -> list[Any]:
    return list(model.layers if hasattr(model, "layers") else model.stages)


def _windows(model: nn.Module, old: Size, new: Size) -> Any:
    """Windows of the stages at the new size: one, where all are the same or cover the map; older timm takes no more."""
    sides, maps = [], []
    for index, stage in enumerate(_stages(model)):
        height, width = max(tuple(block.window_size) for block in stage.blocks)
        sides.append((scaled_window(height, old[0], new[0]), scaled_window(width, old[1], new[1])))
        maps.append(tuple(-(-side // (_patch(model) << index)) for side in new))
    largest = max(sides)
    if all(side in (largest, whole) for side, whole in zip(sides, maps, strict=True)):
        return largest[0] if largest[0] == largest[1] else largest
    return sides

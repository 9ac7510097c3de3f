"""The released files, timm's and this package's own: read without running their code, loaded at any size, converted."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors import safe_open
from timm.utils import unwrap_model
from torch import Tensor, nn

from leap_efficienttrain.models import VARIANTS, create_model, find
from leap_efficienttrain.official import COMPUTED, family_of, official_names, official_state, timm_names
from leap_efficienttrain.tables import find_resampling
from leap_shared import files
from leap_shared.checkpoints import load_into, read, unwrap, write_safetensors
from leap_shared.errors import UserError
from leap_shared.vision.bodies import drop_computed
from leap_shared.vision.official import SUFFIXES, Conversion

__all__ = ["Checkpoint", "convert", "load_checkpoint", "load_state", "read_checkpoint", "save_official"]

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Model = TypeVar("Model", bound=nn.Module)
SIZED = ("pos_embed", "relative_position_bias_table")
BODY = 0.8  # of all parameters, or more, are outside the head
HEADS = ("head.fc.fc2", "head.fc2", "head.fc", "head", "fc")  # in the order of how telling they are
FOLDER = {"model": "weights.safetensors", "ema": "ema.safetensors"}  # of a training's


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        state: weights by the names in the file, without index tables and masks.
        which: "model", or "ema" for their moving average.
        epoch: the last finished one, "best" or "best-ema"; None where the file does not say.
        arguments: of the training; empty where the file holds none.
    """

    state: dict[str, Tensor]
    which: str
    epoch: int | str | None
    arguments: dict[str, Any]

    @cached_property
    def variant(self) -> str | None:
        """Official name of the model that the weights fit, whatever their head and image size; None for any other."""
        shapes = _body({name: tuple(value.shape) for name, value in official_names(self.state).items()})
        (family, _), count = family_of(shapes), sum(map(math.prod, shapes.values()))
        near = (
            name for name, v in VARIANTS.items() if v.family == family and BODY * v.parameters < count < v.parameters
        )
        names = [name for name in near if _schema(name) == shapes]
        told = find(str(self.arguments.get("model", "")))
        return told.name if told and told.name in names else next(iter(names), None)  # CSWin has equals at 224 and 384

    @property
    def size(self) -> int:
        """Side of the images in pixels: by the tables, else by the arguments, else 224."""
        for name, value in self.state.items():
            if name.endswith("relative_position_bias_table"):
                return (math.isqrt(value.shape[0]) + 1) // 2 * 32
            if name == "pos_embed" and value.ndim == 3 and "patch_embed.proj.weight" in self.state:
                return math.isqrt(value.shape[1]) * self.state["patch_embed.proj.weight"].shape[-1]
        size = self.arguments.get("input_size", 224)
        return size if isinstance(size, int) else 224

    @property
    def num_classes(self) -> int:
        """Of the head; 0 where there is none."""
        found = (self.state[f"{name}.bias"] for name in HEADS if f"{name}.bias" in self.state)
        return next((len(bias) for bias in found), 0)


def read_checkpoint(path: str | Path, *, which: str = "model") -> Checkpoint:
    """Weights of a file, and what it says of them; nothing that it holds is ever run.

    Args:
        path: a released .pth, a .pth or .safetensors with timm's names, or the folder of a training.
        which: "model", or "ema" for the moving average.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or has no moving average.
    """
    if which not in FOLDER:
        raise UserError(f"which={which!r}: expected 'model' or 'ema'")
    path = Path(path)
    folder = path.is_dir()
    file = path / FOLDER[which] if folder else path
    with torch.serialization.safe_globals([argparse.Namespace]):  # which is plain data
        content = read(file, skip_foreign=True)
    try:
        state = drop_computed(unwrap(content, ema=which == "ema" and not folder))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    epoch = content.get("epoch")
    given = _metadata(file) if file.suffix == ".safetensors" else content.get("args")
    arguments = given if isinstance(given, Mapping) and given else getattr(given, "__dict__", {})
    return Checkpoint(state, which, epoch if isinstance(epoch, int | str) else None, dict(arguments))


def _metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        texts: dict[str, str] = file.metadata() or {}
    return {name: int(text) if text.isdecimal() else text for name, text in texts.items()}


def load_checkpoint(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    which: str = "model",
    strict: bool = True,
    resize: bool = True,
    new_head: bool = False,
) -> nn.Module:
    """Load a released file, or one with timm's names, into a model.

    Args:
        path: see `read_checkpoint`.
        model: timm's, or this package's CSWin; None for a new one, of the kind, size and classes of the file.
        which: "ema" for the moving average of the weights.
        strict: refuse what does not fit; otherwise it is left out, and logged.
        resize: resample tables that are for another image size.
        new_head: leave out a head of another shape and keep the model's own, as the authors' fine-tuning does.

    Returns:
        The model; where this raises, it is as it was.

    Raises:
        UserError: the file can't be read, holds no moving average or does not fit: says what first, and what would.
    """
    found = read_checkpoint(path, which=which)
    try:
        network = _new_model(found) if model is None else model
        return load_state(network, found.state, strict=strict, resize=resize, new_head=new_head)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_state(
    model: Model, state: Mapping[str, Tensor], *, strict: bool = True, resize: bool = True, new_head: bool = False
) -> Model:
    """Load weights under the released code's names or timm's into a model; see `load_checkpoint`."""
    inner = unwrap_model(model)
    own = inner.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}  # optional
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    given = {**counters, **timm_names(drop_computed(state), shapes)}
    if resize:
        given = _resized(given, own)
    if new_head:
        given = _with_own_head(given, own, inner)
    try:
        report = load_into(inner, given, strict=strict)
    except UserError as error:
        raise UserError(f"{error}. {_advice(state, given, own, inner, resize)}") from error
    if not report.fits:
        log.warning("not all of the checkpoint fits %s: %s", type(inner).__name__, report)
    return model


def _new_model(found: Checkpoint) -> nn.Module:
    name = found.variant or str(found.arguments.get("model", ""))
    if found.variant is None and not timm.is_model(name):
        raise UserError(f"the file fits no model of the papers ({', '.join(VARIANTS)}): give the model to load it into")
    return create_model(name, size=found.size, num_classes=found.num_classes)


def _resized(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    resized = dict(state)
    for name, value in state.items():
        if name.endswith(SIZED) and name in own and own[name].shape != value.shape:
            change = find_resampling(name, tuple(value.shape), tuple(own[name].shape))
            resized[name] = value if change is None else change(value)
    return resized


def _with_own_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with the model's head in place of what does not fit it or is missing."""
    prefix = _head(model)
    fits = {name: name in own and own[name].shape == value.shape for name, value in state.items()}
    kept = {name: value for name, value in state.items() if fits[name] or not name.startswith(prefix)}
    return {**{name: value for name, value in own.items() if name.startswith(prefix)}, **kept}


def _head(model: nn.Module) -> str:
    """What the names of the classifier's parameters begin with."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = str(config.get("classifier") or next((name for name in HEADS if hasattr(model, name)), "head"))
    return name.removesuffix(".fc2") + "."  # CAFormer's head is an MLP


def _advice(
    state: Mapping[str, Tensor], given: Mapping[str, Tensor], own: Mapping[str, Tensor], model: nn.Module, resize: bool
) -> str:
    shapes = [{name: value.shape for name, value in entries.items()} for entries in (given, own)]
    wrong = {name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)}
    of_head = {name for name in wrong if name.startswith(_head(model))}
    found = Checkpoint(drop_computed(state), "model", None, {})
    if wrong == of_head:
        return f"It is for {found.num_classes} classes: pass new_head=True, or create the model for as many"
    if not resize and all(name.endswith(SIZED) for name in wrong - of_head):
        return f"It is for images of {found.size} pixels: pass resize=True"
    return f"It fits {found.variant}" if found.variant else "It fits no model of the papers"


def _body(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Official names and shapes of what depends neither on the classes nor on the image size."""
    return {
        name: shape
        for name, shape in shapes.items()
        if not name.startswith(("head.", "fc.")) and not name.endswith(SIZED)
    }


@cache
def _schema(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = drop_computed(official_state(create_model(name)))
    return _body({key: tuple(value.shape) for key, value in state.items()})


def convert(path_in: str | Path, path_out: str | Path, to: str = "timm", *, which: str = "model") -> Conversion:
    """Write a file's weights anew, bit by bit, under timm's names or the released code's.

    A .pth with official names has the envelope and, for Swin, the index tables and masks of the released files; other
    files hold weights alone.

    Args:
        path_in: see `read_checkpoint`.
        path_out: .pth or .safetensors.
        to: whose names, "timm" or "official".
        which: "model", or "ema" for the moving average.

    Raises:
        UserError: a file can't be read or written, both are one, or the weights fit no model of the papers.
    """
    source, target = Path(path_in), Path(path_out)
    if to not in ("timm", "official"):
        raise UserError(f"to={to!r}: expected 'timm' or 'official'")
    if target.suffix not in SUFFIXES:
        raise UserError(f"{target} ends in {target.suffix or 'nothing'}: expected {' or '.join(SUFFIXES)}")
    if source.resolve() == target.resolve():
        raise UserError(f"{target} would replace the file that it is made of: give another name")
    found = read_checkpoint(source, which=which)
    if found.variant is None:
        raise UserError(f"{source} fits no model of the papers: expected one of {', '.join(VARIANTS)}")
    model = _new_model(found)
    try:
        load_state(model, found.state, resize=False)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = timm_names(found.state, own) if to == "timm" else official_names(found.state)
    facts = {"model": found.variant, "input_size": found.size, "nb_classes": found.num_classes}
    if target.suffix == ".safetensors":
        write_safetensors(target, state, {"format": "pt", **{key: str(value) for key, value in facts.items()}})
    elif to == "timm":
        _write(target, {"arch": VARIANTS[found.variant].timm_name, "epoch": found.epoch, "state_dict": _plain(state)})
    else:
        computed = {name: value for name, value in official_state(model).items() if name.endswith(COMPUTED)}
        _write(target, _envelope({**state, **computed}, found.epoch, facts))
    _verify(target, state)
    parameters = sum(value.numel() for value in state.values())
    return Conversion(target, found.variant, len(state), parameters, files.sha256(target), "tensors")


def save_official(
    model: nn.Module,
    path: str | Path,
    *,
    size: int | None = None,
    epoch: int | str | None = None,
    ema: nn.Module | None = None,
) -> None:
    """Write weights as the released code writes them, so that it can load them strictly.

    Args:
        model: of the papers, or wrapped by DistributedDataParallel or torch.compile.
        path: .pth.
        size: side of the images in pixels, for models that do not tell it themselves; None means 224 for them.
        epoch: last finished one, or "best".
        ema: moving average of the model.

    Raises:
        UserError: the file can't be written.
    """
    inner = unwrap_model(model)
    state, side = official_state(inner), getattr(inner, "img_size", 224)
    told = {"input_size": size or (side if isinstance(side, int) else side[0])}
    found = Checkpoint(drop_computed(state), "model", epoch, told)
    facts = {"model": found.variant, "input_size": found.size, "nb_classes": found.num_classes}
    average = {} if ema is None else {"model_ema": _plain(official_state(unwrap_model(ema)))}
    _write(Path(path), {**_envelope(state, epoch, facts), **average})


def _envelope(state: Mapping[str, Tensor], epoch: int | str | None, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": _plain(state), "epoch": epoch, "args": argparse.Namespace(**facts)}


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with files.atomic_writer(path) as file:
        torch.save(dict(content), file)


def _verify(path: Path, state: Mapping[str, Tensor]) -> None:
    again = read_checkpoint(path).state
    if again.keys() != state.keys() or not all(torch.equal(again[name], value.cpu()) for name, value in state.items()):
        raise RuntimeError(f"{path} does not hold what was written: check the disk")

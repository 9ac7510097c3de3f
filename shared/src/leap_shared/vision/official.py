"""The files of official weights, and a package's own: reading, fitting to a model, naming the variant, converting."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from torch import Tensor, nn

from leap_shared import files
from leap_shared.checkpoints import Report, load_into, read, unwrap, write_safetensors
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies import CSWinBlock, WindowAttention, drop_computed
from leap_shared.vision.bodies.grids import Size, resample_grid
from leap_shared.vision.optimisation import build_model

__all__ = ["SUFFIXES", "Conversion", "Official", "find", "read_official", "save_safetensors"]

log = logging.getLogger(__name__)
HEAD = ("head.weight", "head.bias")
SUFFIXES = (".pth", ".safetensors")
COMPUTED = ("relative_position_index", "attn_mask")

Kind = TypeVar("Kind")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        written: the file.
        variant: whose weights they are, but for head and image size; None where no variant of this package fits.
        tensors, parameters: how many tensors and numbers were written, without tables of indices.
        sha256: of the file that was written.
        verified: what was found equal bit by bit in both files: "tensors and logits", "tensors" where no variant has
            exactly these shapes, or "nothing" where it was not asked for.
    """

    written: Path
    variant: str | None
    tensors: int
    parameters: int
    sha256: str
    verified: str


def find(name: str, variants: Mapping[str, Kind]) -> Kind:
    """The variant of that name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    if name not in variants:
        raise UserError(f"model {name!r} is unknown: {did_you_mean(name, variants)}")
    return variants[name]


def read_official(path: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Weights of a file by the authors' names, without index tables and masks; its pickled config is never run.

    Args:
        path: a .pth (bare state dict, or in the authors' envelope) or a .safetensors.
        use_ema: take the moving average.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or has no moving average.
    """
    return drop_computed(unwrap(read(path, skip_foreign=True), ema=use_ema))


def save_safetensors(model: nn.Module, path: str | Path) -> None:
    """Write the model's weights under the authors' names, readable by `load_official` and by any safetensors reader.

    Raises:
        UserError: the folder is missing or not writable.
    """
    write_safetensors(Path(path), model.state_dict(), {"format": "pt", "model": type(model).__name__})


@dataclass(frozen=True)
class Official:
    """Files of one package's models, whose bodies are those of `leap_shared.vision.bodies` or alike.

    Attributes:
        variants: counted parameters of each variant that timm knows.
        families: regular expression for the names of a family's variants, by what the names of its entries begin with.
        no_download: what to do where there are no weights to download, with {name} for the variant's.
        no_variant: what to say of a file that fits no variant.
    """

    variants: Mapping[str, int]
    families: Mapping[str, str]
    no_download: str
    no_variant: str = "It fits no variant of this package: is it one of the authors' classification checkpoints?"

    def prepare(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Mend a state dict in place before it is matched with a model, or refuse it."""

    def adapt(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Bring a new model into the form that a state dict is of, where there are several."""

    def trained(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state dict in the form that new models have, as far as shapes go."""
        return state

    def place(self, model: nn.Module, name: str) -> tuple[Size, int] | None:
        """Grid of a table that the bodies do not know, and rows before it that belong to no place."""
        del model, name
        return None

    def create_model(
        self,
        name: str,
        *,
        pretrained: bool | str | Path = False,
        checkpoint: str | Path | None = None,
        resize: bool = False,
        **options: Any,
    ) -> nn.Module:
        """A named variant, with the weights of a file where one is given.

        Args:
            name: of a variant, see `VARIANTS`.
            pretrained: the path of a checkpoint, as `checkpoint`; there is no address to fetch weights from.
            checkpoint: the authors' .pth or this package's .safetensors; with `num_classes` it may be for another
                number of classes, and the head then starts at zero.
            resize: take a file that is for another image size.
            **options: of the model's class, and timm's, as `num_classes`, `img_size`, `drop_path_rate` or
                `features_only`.

        Raises:
            UserError: the name is unknown, an option is impossible, or the file does not fit.
        """
        find(name, self.variants)
        if pretrained is True:
            raise UserError(f"{name} has no weights to download: {self.no_download.format(name=name)}")
        path = checkpoint or pretrained or None
        model = build_model(name, options)
        if path is None:
            return model
        state = read_official(path)
        self.adapt(model, state)
        if not options.get("features_only"):
            self._load(model, state, path, resize, None, "num_classes" in options)
            return model
        rest = {key: value for key, value in options.items() if key not in ("features_only", "out_indices")}
        whole = timm.create_model(name, **{**rest, "num_classes": 0})
        self.adapt(whole, state)
        self._load(whole, state, path, resize, None, True)
        found = {f"model.{key}": value for key, value in whole.state_dict().items()}
        model.load_state_dict({key: found[key] for key in model.state_dict()})
        return model

    def load_official(
        self,
        model: nn.Module,
        path: str | Path,
        *,
        use_ema: bool = False,
        resize: bool = False,
        source_size: Size | None = None,
        new_head: bool = False,
    ) -> Report:
        """Load a file into a model, every entry or none.

        Args:
            model: one of this package's.
            path: see `read_official`.
            use_ema: see `read_official`.
            resize: resample tables where the file is for another image size, as the authors' fine-tuning loader does.
            source_size: height and width in pixels that the file is for, where the image was not square.
            new_head: zero the head where the file's has another number of classes, and leave the file's out where the
                model has none, instead of refusing the file.

        Returns:
            What was loaded; everything fits, or it raises.

        Raises:
            UserError: something does not fit: says what first, and which variant would.
        """
        return self._load(model, read_official(path, use_ema=use_ema), path, resize, source_size, new_head)

    def _load(
        self,
        model: nn.Module,
        state: dict[str, Tensor],
        path: str | Path,
        resize: bool,
        source_size: Size | None,
        new_head: bool,
    ) -> Report:
        state = dict(state)
        try:
            self.prepare(model, state)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if resize:
            state = self.resize_tables(model, state, source_size)
        if new_head:
            state = _with_head(state, model.state_dict(), path)
        try:
            return load_into(model, state)
        except UserError as error:
            raise UserError(f"{path}: {error}. {self._advice(model, state, resize)}") from error

    def _advice(self, model: nn.Module, state: Mapping[str, Tensor], resize: bool) -> str:
        shapes, ways = [_shapes(entries) for entries in (model.state_dict(), state)], []
        wrong = {name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name)}
        sized = {name for name in wrong if _is_sized(name) or ".get_v." in name}  # a small map has one branch of CSWin
        if sized and not resize:
            ways.append("another image size: pass resize=True")
        if wrong & set(HEAD):
            ways.append("other classes: pass new_head=True")
        if ways and wrong == sized | (wrong & set(HEAD)):
            return f"It is for {' and for '.join(ways)}"
        fitting = self.variants_of(state)
        return f"It fits {' or '.join(fitting)}" if fitting else self.no_variant

    def variants_of(self, state: Mapping[str, Tensor]) -> list[str]:
        """Names of the variants that a state dict fits: exactly, or else but for its head, or its image size too."""
        shapes = _shapes(self.trained(state))
        count = sum(map(math.prod, shapes.values()))
        exact = [name for name, number in self.variants.items() if number == count and _schema(name) == shapes]
        if exact:
            return exact
        roots = {key.partition(".")[0] for key in shapes}
        patterns = [pattern for root, pattern in self.families.items() if root in roots]
        candidates = [name for name in self.variants if any(re.fullmatch(pattern, name) for pattern in patterns)]
        for ignored in (HEAD, None):
            fitting = [name for name in candidates if _body(_schema(name), ignored) == _body(shapes, ignored)]
            if fitting:
                return fitting
        return []

    def resize_tables(
        self, model: nn.Module, state: Mapping[str, Tensor], source_size: Size | None = None
    ) -> dict[str, Tensor]:
        """State dict whose tables of another image size are resampled to the model's, by the rules of fine-tuning.

        Positional encodings, relative position biases and absolute embeddings: bicubic; PVT's `pos_embed`: bilinear.
        Where a stripe covers the map, a softmax block of CSWin has one branch, and at larger sizes two, of the same
        kernels.

        Raises:
            UserError: the file's grid can't be told from its tables: give `source_size`.
        """
        own = model.state_dict()
        resized = _rebranched(model, state)
        for name, value in state.items():
            table = _is_sized(name) and value.ndim < 4  # a table of more dimensions is not one of places
            if table and name in own and value.shape != own[name].shape and value.ndim == own[name].ndim:
                resized[name] = self._resized(model, name, value, source_size)
        return resized

    def _resized(self, model: Any, name: str, table: Tensor, source_size: Size | None) -> Tensor:
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, WindowAttention):
            old, new = math.isqrt(table.shape[0]), 2 * owner.window - 1
            if old * old != table.shape[0]:
                raise UserError(f"{name} has {table.shape[0]} rows: expected a square number")
            return resample_grid(table[None], (old, old), (new, new))[0]
        image: Size = model.img_size
        stage, mode = int(name[-1]) - 1 if name[-1].isdigit() else 0, "bicubic"
        place = self.place(model, name)
        if place is None:
            place, mode = ((image[0] // (4 << stage), image[1] // (4 << stage)), 0), model.position_mode
        grid, prefix = place
        old_grid = _grid_of(name, table.shape[1] - prefix, grid, image, source_size)
        return torch.cat((table[:, :prefix], resample_grid(table[:, prefix:], old_grid, grid, mode)), 1)

    def convert(
        self,
        path_in: str | Path,
        path_out: str | Path,
        use_ema: bool = False,
        verify: bool = True,
        change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> Conversion:
        """Weights of one file into one of the other kind, bit by bit: .safetensors, or .pth in the authors' envelope.

        Index tables and masks are left out of a .safetensors; a .pth gets them again, so that the authors' code can
        load it strictly, where the weights are exactly a variant's.

        Args:
            path_in: the authors' .pth or a .safetensors.
            path_out: what to write; the ending says which kind.
            use_ema: take the moving average of the weights.
            verify: read the written file again and compare.
            change: makes the state dict to write from the one that was read.

        Raises:
            UserError: an ending is unknown, the files are one, the first cannot be read, or the second not written.
        """
        source, target = Path(path_in), Path(path_out)
        for path in (source, target):
            if path.suffix not in SUFFIXES:
                raise UserError(f"{path} ends in {path.suffix or 'nothing'}: expected {' or '.join(SUFFIXES)}")
        if source.resolve() == target.resolve():
            raise UserError(f"{target} would replace the file that it is made of: give another name")
        given = read_official(source, use_ema=use_ema)
        state = given if change is None else change(given)
        names = self.variants_of(state)
        variant = " or ".join(names) or None
        model = self._exact(names, state)
        if target.suffix == ".pth":
            computed = {} if model is None else _computed(model)
            content = {name: value.detach().clone().contiguous() for name, value in {**state, **computed}.items()}
            with files.atomic_writer(target) as file:
                torch.save({"model": content}, file)
        else:
            write_safetensors(target, state, {"format": "pt", **({"model": variant} if variant else {})})
        verified = _verify(target, state, model) if verify else "nothing"
        parameters = sum(value.numel() for value in state.values())
        return Conversion(target, variant, len(state), parameters, files.sha256(target), verified)

    def _exact(self, names: list[str], state: Mapping[str, Tensor]) -> nn.Module | None:
        """The variant whose tensors have exactly the shapes of `state`, with these weights."""
        if not names:
            return None
        model: nn.Module = timm.create_model(names[0])
        self.adapt(model, state)
        try:
            load_into(model, state)
        except UserError:  # another head, or another image size
            return None
        return model.eval()


def _with_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The state with the head that a model of `own` needs: the file's, zeros, or none."""
    if "head.weight" not in own:
        return {name: value for name, value in state.items() if name not in HEAD}
    given = [state[name].shape[:1] for name in HEAD if name in state]
    if len(given) < len(HEAD) or given == [own[name].shape[:1] for name in HEAD]:
        return dict(state)  # what is missing or fits is for the strict loader to judge
    log.warning("%s: its head does not fit %d classes, so the head starts at zero", path, len(own["head.bias"]))
    return {**state, **{name: torch.zeros_like(own[name]) for name in HEAD}}


def _is_sized(name: str) -> bool:
    """Whether an entry's shape depends on the image size."""
    leaf = name.rpartition(".")[2]
    return leaf.startswith("pos_embed") or leaf in (
        "positional_encoding",
        "relative_position_bias_table",
        "absolute_pos_embed",
    )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


@cache
def _schema(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return _shapes(timm.create_model(name).state_dict())


def _body(shapes: Shapes, ignored: tuple[str, ...] | None) -> dict[str, tuple[int, ...] | None]:
    """Shapes without the head; None ignores those of tables that depend on the image size too."""
    body = {name: shape for name, shape in shapes.items() if name not in HEAD}
    return {name: None if ignored is None and _is_sized(name) else shape for name, shape in body.items()}


def _rebranched(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(state)
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, CSWinBlock)}
    for (name, block), leaf in itertools.product(blocks.items(), ("weight", "bias")):
        first, second = (f"{name}.attns.{branch}.get_v.{leaf}" for branch in (0, 1))
        if block.plugged or first not in found:
            continue
        if len(block.attns) == 1 and second in found:
            found[first] = torch.cat((found[first], found.pop(second)))
        elif len(block.attns) == 2 and second not in found:
            found[first], found[second] = found[first].chunk(2)
    return found


def _grid_of(name: str, count: int, grid: Size, image: Size, source_size: Size | None) -> Size:
    """Height and width of a file's table of `count` rows, for which the model has `grid` at the size `image`."""
    side = math.isqrt(count)
    guesses = [(side, side)]
    if source_size is not None:
        guesses = [(grid[0] * source_size[0] // image[0], grid[1] * source_size[1] // image[1]), *guesses]
    elif grid[0] != grid[1]:  # a stripe keeps its width; a map its ratio
        factor = math.sqrt(count / (grid[0] * grid[1]))
        scaled = (round(grid[0] * factor), round(grid[1] * factor))
        guesses = [*guesses, (count // grid[1], grid[1]), (grid[0], count // grid[0]), scaled]
    for guess in guesses:
        if guess[0] * guess[1] == count:
            return guess
    raise UserError(f"{name} has {count} rows, and nothing tells their height and width: pass source_size=(H, W)")


def _computed(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith(COMPUTED)}


def _verify(path: Path, state: Mapping[str, Tensor], model: nn.Module | None) -> str:
    again = read_official(path)
    differing = [name for name in {**state, **again} if not _same(state.get(name), again.get(name))]
    if differing:
        raise RuntimeError(f"{path}: {len(differing)} tensors are not those that were read: {differing[:5]}")
    if model is None:
        return "tensors"
    size: Any = model.img_size
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(image)
        load_into(model, again)
        after = model(image)
    if not _same(before, after):
        raise RuntimeError(f"{path}: the logits of the two files differ")
    return "tensors and logits"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(first, second)

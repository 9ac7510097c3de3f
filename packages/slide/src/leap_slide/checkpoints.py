"""Training and deploy files: reading, fitting to another image size, naming the variant, writing.

Nobody has published weights of a Slide model, so all files are users' own: in the layout of the authors' training code,
or this package's .safetensors. `leap_slide.convert.from_swin` starts a model from published weights of others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from leap_shared.vision.bodies.grids import Size
from leap_shared.vision.official import Official, read_official, save_safetensors
from leap_slide import models  # noqa: F401 - registers the variants
from leap_slide.attention import MERGED, SlideAttention, check_state
from leap_slide.models.variants import VARIANTS

__all__ = ["OFFICIAL", "create_model", "load_official", "merge_paths", "read_official", "resize_tables"]
__all__ += ["save_safetensors", "slide_layers", "variants_of"]


def slide_layers(model: nn.Module) -> Iterator[tuple[str, SlideAttention]]:
    """Every slide attention in a model, with what the names of its entries begin with."""
    for name, layer in model.named_modules():
        if isinstance(layer, SlideAttention):
            yield f"{name}." if name else "", layer


def merge_paths(model: nn.Module) -> None:
    """Make one path of the two in every slide attention, and mark the model so."""
    for _, layer in slide_layers(model):
        layer.reparameterize()
    if not isinstance(model, SlideAttention):  # which tells by itself
        model.reparameterized = True  # type: ignore[assignment] # a plain attribute


class _Slide(Official):
    def prepare(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Check every slide attention's entries before any is loaded."""
        for prefix, layer in slide_layers(model):
            check_state(layer, state, prefix)

    def adapt(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Make one path of the two for the weights of a deploy file."""
        if any(f"{MERGED}." in name for name in state):
            merge_paths(model)

    def trained(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Two paths, of the shapes of the one of a deploy file."""
        return {name.replace(MERGED, path): x for name, x in state.items() for path in ("dep_conv", "dep_conv1")}

    def resize_tables(
        self, model: nn.Module, state: Mapping[str, Tensor], source_size: Size | None = None
    ) -> dict[str, Tensor]:
        """State dict whose tables of another image size are resampled to the model's, by the rules of fine-tuning.

        Relative position biases of windows and absolute embeddings: bicubic; PVT's `pos_embed`: bilinear; kernels of
        patches of another size: bicubic. Those of slide attention do not depend on the size, and stay.

        Raises:
            UserError: the file's grid can't be told from its tables: give `source_size`.
        """
        own, resized = model.state_dict(), super().resize_tables(model, state, source_size)
        for name, value in state.items():
            if name.startswith("patch_embed") and name.endswith(".proj.weight") and name in own:
                side = own[name].shape[2:]
                if value.ndim == 4 and value.shape[2:] != side:
                    resized[name] = F.interpolate(value.float(), side, mode="bicubic").to(value.dtype)
        return resized


OFFICIAL = _Slide(
    variants={name: variant.parameters for name, variant in VARIANTS.items()},
    families={
        "layers": "slide_swin_.+",
        "pos_embed1": "slide_pvt_[a-z]+",
        "norm4": "slide_pvt_v2_.+",
        "stage1": "slide_cswin_.+",
        "levels": "slide_nat_.+",
    },
    no_download=(
        "nobody has published any; give the path of your own, checkpoint='{name}.safetensors', or start from weights "
        "of Swin or PVT with leap_slide.convert.from_swin"
    ),
    no_variant=(
        "It fits no variant of this package; weights of Swin, PVT, DeiT or ViT start a model or layer with "
        "leap_slide.convert.from_swin"
    ),
)
create_model = OFFICIAL.create_model
load_official = OFFICIAL.load_official
resize_tables = OFFICIAL.resize_tables
variants_of = OFFICIAL.variants_of

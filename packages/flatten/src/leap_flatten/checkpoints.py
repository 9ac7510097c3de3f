"""The authors' files and this package's: reading, fitting to another image size, naming the variant, writing."""

from __future__ import annotations

from torch import nn

from leap_flatten import models  # registers the variants
from leap_flatten.attention import Focused
from leap_flatten.models.variants import VARIANTS
from leap_shared.vision.bodies.grids import Size
from leap_shared.vision.official import Official, read_official, save_safetensors

__all__ = ["OFFICIAL", "create_model", "load_official", "read_official", "resize_tables"]
__all__ += ["save_safetensors", "variants_of"]


class _Flatten(Official):
    def place(self, model: nn.Module, name: str) -> tuple[Size, int] | None:
        """Grid and class tokens of a positional encoding, or of DeiT's embedding."""
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Focused):
            return owner.grid, owner.prefix_tokens
        return (model.grid, 1) if isinstance(model, models.FlattenDeiT) else None


OFFICIAL = _Flatten(
    variants={name: variant.parameters for name, variant in VARIANTS.items()},
    families={
        "layers": "flatten_swin_.+",
        "pos_embed1": "flatten_pvt_[a-z]+",
        "norm4": "flatten_pvt_v2_.+",
        "stage1": "flatten_cswin_.+",
        "cls_token": "flatten_deit_.+",
    },
    no_download="give the path of a file, checkpoint='flatten_swin_t.pth'",
)
create_model = OFFICIAL.create_model
load_official = OFFICIAL.load_official
resize_tables = OFFICIAL.resize_tables
variants_of = OFFICIAL.variants_of

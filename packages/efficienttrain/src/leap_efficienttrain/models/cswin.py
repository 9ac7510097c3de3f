"""CSWin (Dong et al. 2022), which timm lacks, registered with timm under the released names and short ones.

The stripes of stage 3 are size / 32 wide at every image size, whatever the name says, and nothing in the state depends
on the size: one checkpoint serves all sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_shared.vision.bodies import CSWin, build, pretrained_config

__all__ = ["CSWin"]

TINY = {"embed_dim": 64, "depths": (1, 2, 21, 1), "num_heads": (2, 4, 8, 16)}
SMALL = {"embed_dim": 64, "depths": (2, 4, 32, 2), "num_heads": (2, 4, 8, 16)}
BASE = {"embed_dim": 96, "depths": (2, 4, 32, 2), "num_heads": (4, 8, 16, 32)}
LARGE = {"embed_dim": 144, "depths": (2, 4, 32, 2), "num_heads": (6, 12, 24, 24)}
SPLIT_SIZES = (1, 2, 0.5, 1.0)  # in tokens, or as a share of the map: half of size / 16, and all of size / 32
AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "CSWin_64_12211_tiny_224": (TINY, {}),
    "CSWin_64_24322_small_224": (SMALL, {}),
    "CSWin_96_24322_base_224": (BASE, {}),
    "CSWin_96_24322_base_384": (BASE, AT_384),
    "CSWin_144_24322_large_224": (LARGE, {}),
    "CSWin_144_24322_large_384": (LARGE, AT_384),
    "cswin_tiny": (TINY, {}),
    "cswin_small": (SMALL, {}),
    "cswin_base": (BASE, {}),
    "cswin_large": (LARGE, {}),
}
default_cfgs = generate_default_cfgs({name: pretrained_config(CSWin, **config) for name, (_, config) in MODELS.items()})


def _entrypoint(name: str, sizes: dict[str, Any]) -> Callable[..., nn.Module]:
    def make(pretrained: bool = False, **options: Any) -> nn.Module:
        return build(CSWin, name, pretrained, **{"split_sizes": SPLIT_SIZES, **sizes, **options})

    make.__name__ = make.__qualname__ = name  # timm registers it under this
    return make


for _name, (_sizes, _) in MODELS.items():
    globals()[_name] = register_model(_entrypoint(_name, _sizes))

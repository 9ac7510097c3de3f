"""The variants: what was counted here, and what the paper's tables and plots say (Pan et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from leap_shared.vision import official
from leap_shared.vision.bodies.grids import Number

__all__ = ["VARIANTS", "Variant", "find"]


@dataclass(frozen=True)
class Variant:
    """Facts of one named model. Nobody has published weights of any of them.

    Attributes:
        name: under which timm knows it.
        parameters: counted, all of them, the frozen shifts too.
        gmac: counted multiply-accumulates of one image at `image_size`, in 10^9, in the merged form.
        published_parameters: in 10^6, by the paper's tables; None where there is none.
        published_gmac: in 10^9, by the paper's tables or plots; None where there is none.
        top1: published accuracy on ImageNet-1K in percent; None where there is none.
        note: what to know of the model and of its published numbers.
        image_size: side in pixels.
    """

    name: str
    parameters: int
    gmac: float
    published_parameters: Number | None
    published_gmac: float | None
    top1: float | None
    note: str = ""
    image_size: int = 224

    @property
    def published(self) -> tuple[float | None, float | None]:
        """Top-1 and top-5 on ImageNet-1K in percent, of which the paper has no second."""
        return self.top1, None


DERIVED = "derived: no code published"
PLOT = "read off the plot"
RELEASED = "as released, stages 3 and 4 global; the paper's numbers are given at the form _w7"
WINDOWS = "7x7 windows, which gives the paper's FLOPs"
EXPERIMENTAL = "experimental: no code published"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("slide_swin_tiny", 28_348_834, 4.6811, None, None, None, RELEASED),
        Variant("slide_swin_tiny_w7", 28_308_514, 4.5484, 29.0, 4.6, 82.3, WINDOWS),
        Variant("slide_swin_small", 49_747_378, 9.1970, None, None, None, RELEASED),
        Variant("slide_swin_small_w7", 49_626_418, 8.7987, 51.0, 8.9, 83.7, WINDOWS),
        Variant("slide_swin_base", 87_948_704, 16.0391, None, None, None, RELEASED),
        Variant("slide_swin_base_w7", 87_787_424, 15.5080, 89.0, 15.5, 84.2, WINDOWS),
        Variant("slide_pvt_tiny", 12_224_670, 2.0123, 12.2, 2.0, 78.0, DERIVED),
        Variant("slide_pvt_small", 22_728_459, 3.9525, 22.7, 4.0, 81.7, DERIVED),
        Variant("slide_pvt_medium", 42_450_699, 6.7959, None, 6.8, 82.9, f"{DERIVED}; {PLOT}"),
        Variant("slide_pvt_v2_b1", 13_005_406, 2.1943, 13.0, 2.2, 79.5, DERIVED),
        Variant("slide_pvt_v2_b2", 23_606_475, 4.1732, 22.8, 4.2, 82.7, f"{DERIVED}; parameters do not reproduce"),
        Variant("slide_pvt_v2_b3", 43_482_315, 7.0438, None, 7.1, 83.8, f"{DERIVED}; {PLOT}"),
        Variant("slide_pvt_v2_b4", 59_795_731, 10.3183, None, 10.3, 84.1, f"{DERIVED}; {PLOT}"),
        Variant("slide_cswin_tiny", 20_421_660, 4.3748, None, None, 83.2, f"{EXPERIMENTAL}; {PLOT}"),
        Variant("slide_cswin_small", 34_671_644, 6.8336, 35.0, 6.9, 84.0, EXPERIMENTAL),
        Variant("slide_cswin_base", 73_078_660, 15.0560, 78.0, 15.0, 84.7, EXPERIMENTAL),
        Variant("slide_nat_mini", 20_020_974, 2.8138, None, 2.7, 82.4, f"{EXPERIMENTAL}; {PLOT}"),
        Variant("slide_nat_tiny", 27_938_382, 4.5238, 28.0, 4.3, 83.6, EXPERIMENTAL),
        Variant("slide_nat_small", 50_754_721, 8.1152, 51.0, 7.8, 84.3, EXPERIMENTAL),
    )
}


def find(name: str) -> Variant:
    """The variant of that name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    return official.find(name, VARIANTS)

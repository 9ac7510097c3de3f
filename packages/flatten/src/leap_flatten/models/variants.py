"""The published variants (table of the paper and its release): sizes, costs and accuracies."""

from __future__ import annotations

from dataclasses import dataclass

from leap_shared.errors import UserError, did_you_mean

__all__ = ["VARIANTS", "Variant", "find"]


@dataclass(frozen=True)
class Variant:
    """Facts of one named model.

    Attributes:
        name: under which timm knows it.
        parameters: counted, all of them.
        gmac: multiply-accumulates of one image at `image_size`, in 10^9 (matrix products and convolutions).
        top1: accuracy on ImageNet-1K in percent by the paper's tables, None where there is none.
        image_size: side in pixels.
        released: whether the authors published weights.
        logged: top-1 and top-5 of the authors' log, where there is one.
        note: where the accuracy is from, where it is not from a table.
    """

    name: str
    parameters: int
    gmac: float
    top1: float | None
    image_size: int = 224
    note: str = ""
    released: bool = False
    logged: tuple[float, float] | None = None

    @property
    def published(self) -> tuple[float | None, float | None]:
        """Top-1 and top-5 on ImageNet-1K in percent: of the authors' log where there is one, else the tables' top-1.

        They come from the "sum" form of the denominator, at the protocol "reference".
        """
        return self.logged or (self.top1, None)


PLOT = "read off the paper's plot"
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("flatten_pvt_tiny", 12_150_504, 2.037, 77.8, released=True, logged=(77.758, 93.910)),
        Variant("flatten_pvt_small", 21_670_248, 4.030, 81.7),
        Variant("flatten_pvt_medium", 37_242_216, 7.036, 83.0, note=PLOT),
        Variant("flatten_pvt_large", 50_649_192, 10.380, 83.45, note=PLOT),
        Variant("flatten_pvt_v2_b0", 3_594_824, 0.580, 71.1, released=True, logged=(71.098, 90.596)),
        Variant("flatten_pvt_v2_b1", 12_931_240, 2.219, 79.5),
        Variant("flatten_pvt_v2_b2", 22_548_264, 4.251, 82.5),
        Variant("flatten_pvt_v2_b3", 38_273_832, 7.284, 83.7, note=PLOT),
        Variant("flatten_pvt_v2_b4", 51_836_968, 10.677, 84.0, note=PLOT),
        Variant("flatten_pvt_v2_b5", 67_061_544, 12.436, None, note="no configuration published"),
        Variant("flatten_swin_tiny", 29_192_384, 4.483, 82.1, released=True, logged=(82.106, 95.900)),
        Variant("flatten_swin_small", 50_510_288, 8.734, 83.5, released=True),
        Variant("flatten_swin_base", 88_972_488, 15.421, 83.8, released=True),
        Variant("flatten_swin_base_384", 91_433_928, 46.382, 85.0, 384, released=True),
        Variant("flatten_cswin_tiny", 21_201_768, 4.324, 83.1, released=True, logged=(83.130, 96.376)),
        Variant("flatten_cswin_small", 35_451_752, 6.783, 83.8),
        Variant("flatten_cswin_base", 74_867_032, 14.913, 84.5),
        Variant("flatten_cswin_base_384", 78_369_112, 46.305, 85.5, 384),
        Variant("flatten_deit_tiny", 6_193_576, 1.145, 74.1, note="derived: no code or weights published"),
    )
}


def find(name: str) -> Variant:
    """The variant of that name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    if name not in VARIANTS:
        raise UserError(f"model {name!r} is unknown: {did_you_mean(name, VARIANTS)}")
    return VARIANTS[name]

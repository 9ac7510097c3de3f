"""Pictures from webdataset's own pipelines, as shards come in, with a transform that a curriculum drives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leap_shared.errors import UserError
from leap_shared.vision.data import UNREADABLE
from leap_shared.vision.sources import SUFFIXES

__all__ = ["Sample", "stream"]


class Sample:
    """Makes the undecoded sample of a shard a transformed picture and its label.

    Args:
        transform: takes the bytes of a file, as `LiveTransform` does.
        label: key of the label, whole numbers as text.
    """

    def __init__(self, transform: Callable[[bytes], Any], label: str = "cls") -> None:
        self.transform, self.label = transform, label

    def __call__(self, sample: Mapping[str, Any]) -> tuple[Any, int]:
        """Picture and label.

        Raises:
            UserError: one of them is missing or cannot be read; names the sample and its shard.
        """
        found = [key for key in sample if f".{key.lower()}" in SUFFIXES]
        try:
            if not found or self.label not in sample:
                raise UserError(f"it has {', '.join(sample)}: expected a picture and {self.label}")
            return self.transform(sample[found[0]]), int(sample[self.label])
        except UNREADABLE as error:
            where = f"{sample.get('__key__')} in {sample.get('__url__')}"
            raise UserError(f"cannot read the picture {where}: {error}: mend it or remove it") from error


def stream(
    urls: str | Sequence[str],
    transform: Callable[[bytes], Any],
    *,
    label: str = "cls",
    shuffle: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Any:
    """A `webdataset.WebDataset` of (picture, label), for its loaders or torch's; it can be composed on.

    It streams, so a training cannot go on in the middle of a pass; local shards that may be read in any order are
    better opened with `leap_shared.vision.open_source`, which `CurriculumLoader` takes. The size must change between
    passes only, as with any transform that is live.

    Args:
        urls: shards, as webdataset takes them.
        transform: takes the bytes of a file: `LiveTransform`.
        label: key of the label.
        shuffle: pictures that are held to be drawn from, and shards are shuffled too; 0 keeps the order.
        seed: of the shuffling.
        **options: of `webdataset.WebDataset`.

    Raises:
        UserError: webdataset is missing.
    """
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise UserError('streams need webdataset: pip install "leap-efficienttrain[webdataset]"') from error
    options = {"shardshuffle": 100 if shuffle else False, "seed": seed, **options}
    options.setdefault("nodesplitter", webdataset.split_by_node)
    data = webdataset.WebDataset(urls, **options)
    if shuffle:
        data = data.shuffle(shuffle, seed=seed)
    return data.map(Sample(transform, label))

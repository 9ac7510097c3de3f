"""The replay buffer of EfficientTrain++: batches that are decoded once and trained on several times."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from leap_shared.errors import UserError

__all__ = ["ReplayBuffer"]

DTYPES = {"uint8": torch.uint8, "float16": torch.float16, None: None}


def free_bytes() -> int | None:
    """Memory that the system could still give; None where it does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class ReplayBuffer:
    """Chunks of the last batches; every fresh batch is joined by chunks that are drawn from them.

    Each fresh batch of f samples is split into `split` chunks, which enter the buffer in place of the oldest; then
    (`times` - 1) * `split` chunks are drawn uniformly with replacement, the fresh ones among them. So a training batch
    has `times` * f samples, of which f were decoded (EfficientTrain++, TPAMI 2024).

    Args:
        capacity_batches: fresh batches that it holds at the most.
        split: chunks of a batch.
        times: training samples for each fresh one; 1 passes every batch on and keeps nothing.
        dtype: "uint8" for pictures before normalisation and erasing, which takes half the memory and lets both be drawn
            again; "float16", as the authors', for what comes after them: stored in halves and given back in float32;
            None for samples of any other kind, as they are.
        ragged: "raise" for batches that `split` does not divide; "keep" for chunks of uneven sizes, as the authors':
            then batches differ in size from update to update, which Mixup may refuse.
        generator: draws the chunks; torch's own unless given, as the authors'.

    Raises:
        UserError: a number is not positive.
    """

    def __init__(
        self,
        capacity_batches: int = 1920,
        split: int = 32,
        times: int = 4,
        dtype: Literal["uint8", "float16"] | None = "uint8",
        *,
        ragged: Literal["raise", "keep"] = "raise",
        generator: torch.Generator | None = None,
    ) -> None:
        for name, value in (("capacity_batches", capacity_batches), ("split", split), ("times", times)):
            if value != int(value) or value < 1:
                raise UserError(f"{name} {value}: expected a whole number, 1 or more")
        self.capacity_batches, self.split, self.times = capacity_batches, split, times
        self.dtype, self.ragged, self.generator = dtype, ragged, generator
        self.clear()

    def __len__(self) -> int:
        """Batches that it holds."""
        return len(self._batches)

    def clear(self) -> None:
        """Forget all batches, as at the start of a stage."""
        self._batches: deque[tuple[Tensor, ...]] = deque(maxlen=self.capacity_batches)

    @overload
    def __call__(self, batch: Tensor) -> Tensor: ...

    @overload
    def __call__(self, batch: Sequence[Tensor]) -> tuple[Tensor, ...]: ...

    def __call__(self, batch: Tensor | Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The fresh batch and, after it, the drawn chunks in the order of the draw.

        Args:
            batch: a tensor of samples, or several tensors of as many samples each, as pictures and labels; the first is
                stored in `dtype`, all of them on their device.

        Returns:
            A tensor, or a tuple of as many as were given.

        Raises:
            UserError: the batch cannot be split, has another dtype or shape, or the buffer would not fit into memory.
        """
        parts = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if self.times > 1:
            parts = self._joined(self._stored(parts))
        return parts[0] if isinstance(batch, Tensor) else parts

    def _stored(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        samples, count = parts[0], len(parts[0])
        if any(len(part) != count for part in parts) or not count:
            raise UserError(f"the parts of the batch have {[len(part) for part in parts]} samples: expected as many")
        if self.ragged == "raise" and count % self.split:
            advice = f"give batches of a multiple of {self.split}, set split to a divisor of {count}, or ragged='keep'"
            raise UserError(f"a batch of {count} samples cannot be split into {self.split} chunks: {advice}")
        if self.dtype == "uint8" and samples.dtype != torch.uint8:
            advice = "give pictures before normalisation, or dtype='float16' or None"
            raise UserError(f"the samples are {samples.dtype}, and the buffer holds uint8: {advice}")
        stored = (samples if self.dtype is None else samples.to(DTYPES[self.dtype]), *parts[1:])
        if not self._batches:
            self._check_memory(sum(part.nbytes for part in stored))
        elif self._batches[-1][0].shape[1:] != samples.shape[1:]:
            shapes = f"{tuple(samples.shape[1:])}, and the buffer holds {tuple(self._batches[-1][0].shape[1:])}"
            raise UserError(f"the samples have the shape {shapes}: call clear() where a stage of another size begins")
        return stored

    def _check_memory(self, batch_bytes: int) -> None:
        needed, free = self.capacity_batches * batch_bytes, free_bytes()
        if free is not None and needed > free:
            gigabytes = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise UserError(
                f"a buffer of {self.capacity_batches} batches takes {gigabytes}: lower capacity_batches to "
                f"{max(free // (2 * batch_bytes), 1)}, or the batch"
            )

    def _joined(self, fresh: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Fresh samples, which enter the buffer, and drawn chunks, copied once."""
        self._batches.append(fresh)
        chunks = len(self._batches) * self.split
        drawn = torch.randint(0, chunks, ((self.times - 1) * self.split,), generator=self.generator).tolist()
        parts = []
        for number, part in enumerate(fresh):
            pieces = [part]
            for index in drawn:
                held = self._batches[index // self.split][number]
                first, last = self._bounds(len(held), index % self.split)
                pieces.append(held[first:last])
            parts.append(torch.cat(pieces))
        if self.dtype == "float16":
            parts[0] = parts[0].float()
        return tuple(parts)

    def _bounds(self, count: int, chunk: int) -> tuple[int, int]:
        """Rows of a chunk: the first `count` mod `split` chunks have one row more."""
        size, more = divmod(count, self.split)
        first = chunk * size + min(chunk, more)
        return first, first + size + (chunk < more)

    def state_dict(self) -> dict[str, Any]:
        """The batches that it holds, and where its own generator stands."""
        generator = None if self.generator is None else self.generator.get_state()
        return {"batches": [list(batch) for batch in self._batches], "generator": generator}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold what another buffer held."""
        self._batches = deque(map(tuple, state["batches"]), self.capacity_batches)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])

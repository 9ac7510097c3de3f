"""One loader and one pool of workers for all stages of a training, which can stop and go on anywhere."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from leap_efficienttrain.finish import Finish
from leap_efficienttrain.pace import Pace
from leap_efficienttrain.plan import State
from leap_efficienttrain.replay import ReplayBuffer
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.data import UNREADABLE, TrainOrder, derive, isolated
from leap_shared.vision.sources import Source

__all__ = ["CurriculumLoader"]

Key = tuple[int, int, int, Number]  # epoch, index of the picture, size, magnitude
BATCH = 1  # sets the random numbers of batches apart from those of pictures


class Pictures(Dataset[Any]):
    """Transformed pictures by key; what cannot be read becomes a UserError in the picture's place."""

    def __init__(self, source: Source, transform: LiveTransform, num_classes: int | None, seed: int) -> None:
        self.source, self.transform, self.num_classes, self.seed = source, transform, num_classes, seed

    def __getitems__(self, keys: list[Key]) -> list[tuple[Tensor, int] | UserError]:
        with isolated(self.seed):  # once for the batch: it costs as much as a tenth of a picture
            return [self._get(*key) for key in keys]

    def _get(self, epoch: int, index: int, size: int, magnitude: Number) -> tuple[Tensor, int] | UserError:
        _seed(derive(self.seed, epoch, index))
        try:
            image, label = self.source[index]
            picture, label = self.transform(image, size=size, magnitude=magnitude), int(label)
        except UNREADABLE as error:
            return UserError(f"cannot read the picture {self._where(index)}: {error}: mend it or remove it")
        if label < 0 or (self.num_classes is not None and label >= self.num_classes):
            return UserError(f"the label of {self._where(index)} is {label}, of {self.num_classes} classes: mend it")
        return picture, label

    def _where(self, index: int) -> str:
        where = getattr(self.source, "where", None)
        return str(where(index)) if where else f"number {index}"


def _seed(seed: int) -> None:
    """Seed the global generators of the CPU; torch.manual_seed would also queue a call per picture for CUDA's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm draws from it
    torch.default_generator.manual_seed(seed)


class Batches:
    """The keys of the batches that come next; the loader's workers stay while these change.

    Attributes:
        parts: epochs, each with rows of indices.
        size, magnitude: of all of them.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[int, Int[Tensor, "batches pictures"]]] = []
        self.size, self.magnitude = 0, 0.0

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch, rows in self.parts:
            for row in rows:
                yield [(epoch, index, self.size, self.magnitude) for index in row.tolist()]


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, UserError)), None) or default_collate(items)


class CurriculumLoader:
    """Micro-batches of whatever state of a curriculum is set, from one pool of workers.

    Order and augmentation of pictures depend on (seed, epoch, index), erasing and replay on (seed, epoch, number of the
    micro-batch, rank): a training that stopped anywhere goes on to the same bits, with any number of workers. The
    processes' shares of an update are disjoint, and together the same pictures under any number of processes.

    Every key that a worker gets carries size and magnitude, so no picture that was prepared early is of another stage.

    Args:
        source: the pictures, see `leap_shared.vision.open_source`.
        transform: with output "uint8".
        num_classes: labels are checked against it.
        seed: of everything random.
        workers: processes that decode; 0 decodes in this one.
        rank, world: this process, of so many.
        device: of the batches.
        dtype: of the pictures.
        replay_dtype: what the replay buffer holds: "uint8" before normalisation and erasing, which are then drawn
            anew; "float16" after them, as the authors'.
        split: chunks of a batch in the replay buffer.
        ragged: see `ReplayBuffer`.
        pin: page-locked memory; where the device is a GPU unless given.
        context: how workers start: fork, spawn or forkserver; the platform's way unless given.

    Attributes:
        replay: the buffer of the stage; its content is no part of the state of the loader, which holds what it was made
            of, and decodes that again.
    """

    def __init__(
        self,
        source: Source,
        transform: LiveTransform,
        *,
        num_classes: int | None = None,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        replay_dtype: Literal["uint8", "float16"] = "uint8",
        split: int = 32,
        ragged: Literal["raise", "keep"] = "raise",
        pin: bool | None = None,
        context: str | None = None,
    ) -> None:
        if transform.output != "uint8":
            raise UserError(f"the transform's output is {transform.output}: give one with output='uint8'")
        if not 0 <= rank < world:
            raise UserError(f"rank {rank} of world {world}: expected 0 to {world - 1}")
        self.source, self.transform, self.seed, self.rank, self.world = source, transform, seed, rank, world
        self.device, self.replay_dtype, self.split, self.ragged = torch.device(device), replay_dtype, split, ragged
        self.pin = self.device.type == "cuda" if pin is None else pin
        augmentation = transform.augmentation
        self.finish = Finish(
            transform.mean,
            transform.std,
            erasing=augmentation.erasing,
            erasing_mode=augmentation.erasing_mode,
            downsample=transform.downsample,
            dtype=dtype,
        )
        self._batches = Batches()
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": self.pin, "persistent_workers": workers > 0}
        self._loader: DataLoader[Any] = DataLoader(
            Pictures(source, transform, num_classes, seed),
            batch_sampler=self._batches,
            collate_fn=_collate,
            generator=torch.Generator(),
            multiprocessing_context=context if workers else None,
            **options,
        )
        self._pace = Pace(workers > 0, self._synchronise)
        self._state: State | None = None
        self._start = 0
        self._buffered: deque[list[int]] = deque()
        self._stage, self._wanted = -1, False
        self.replay = ReplayBuffer(1, 1, 1, None)

    @property
    def images_per_second(self) -> float:
        """Decoded pictures per second that this process was given, or could have been given, until now."""
        return self._pace.had

    def set_state(self, state: State, start: int = 0) -> None:
        """What comes next: the pass of a state, from its update `start` on. The workers stay.

        Raises:
            UserError: the state does not fit the data, the transform, the replay buffer or the number of processes.
        """
        if state.leg.world != self.world:
            raise UserError(f"the state is one of {state.leg.world} processes, and this is one of {self.world}")
        order = self._order(state, start)
        steps = order.updates if state.steps is None else state.steps
        if not 0 <= start <= steps:
            raise UserError(f"start {start}: the pass has {steps} updates")
        if steps > order.updates:
            fit = f"{len(self.source)} pictures fill {order.updates}: give samples={len(self.source)} to epochs()"
            raise UserError(f"the state has {steps} updates, and the {fit}")
        self.transform.set_state(state)
        if state.stage != self._stage:
            self._buffered, self._stage, self._wanted = deque(), state.stage, False
            self.replay = self._new_buffer(state)
        elif self._wanted:
            self.replay = self._new_buffer(state)
        self._state, self._start = state, start
        self._batches.size, self._batches.magnitude = state.size, state.magnitude
        self._batches.parts = [(state.epoch, order.rows[: (steps - start) * state.accumulate])]

    def __len__(self) -> int:
        """Micro-batches that come."""
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "batch 3 height width"], Int[Tensor, " batch"]]]:
        """Micro-batches of `micro_batch` x replay pictures, fresh ones first, and their labels, on the device.

        Raises:
            UserError: no state is set; or naming the picture that cannot be read.

        Warns:
            UserWarning: once, where the loader is slower than what it feeds.
        """
        if self._state is None:
            raise UserError("the loader has no state: call set_state() with one of the curriculum's epochs()")
        return self._iterate(self._state, self._start * self._state.accumulate)

    def state_dict(self) -> dict[str, Any]:
        """Which batches the replay buffer holds: those of a stage, by epoch and number."""
        return {"stage": self._stage, "batches": [list(place) for place in self._buffered]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hold the same batches again: the next pass begins with decoding them."""
        self._stage, self._buffered = state["stage"], deque(list(place) for place in state["batches"])
        self._wanted = True

    def _order(self, state: State, start: int, epoch: int | None = None) -> TrainOrder:
        shape = (state.accumulate, self.world, state.micro_batch)
        epoch = state.epoch if epoch is None else epoch
        return TrainOrder(len(self.source), shape, seed=self.seed, epoch=epoch, rank=self.rank, start=start)

    def _iterate(self, state: State, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        if self._wanted:
            self._refill(state)
        self._pace.start()
        for number, (images, labels) in enumerate(self._decoded(), first):
            self._pace.loaded(len(labels))
            yield self._finished(state, number, images, labels)
            self._pace.asked()

    def _decoded(self) -> Iterator[Any]:
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _finished(self, state: State, number: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        generator = self._generator(state.epoch, number)
        if self.replay.times > 1:
            if self.replay_dtype == "float16":
                images = self.finish(images, state.size, generator)
            self.replay.generator = generator
            images, labels = self.replay((images, labels))
            self._buffered.append([state.epoch, number])
            while len(self._buffered) > state.buffer:
                self._buffered.popleft()
            if self.pin:
                images, labels = images.pin_memory(), labels.pin_memory()
        images, labels = (part.to(self.device, non_blocking=self.pin) for part in (images, labels))
        if self.replay.times == 1 or self.replay_dtype == "uint8":
            images = self.finish(images, state.size, generator)
        return images.to(self.finish.dtype), labels

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, epoch, number, self.rank, BATCH) % 2**63)

    def _new_buffer(self, state: State) -> ReplayBuffer:
        if state.replay == 1:
            return ReplayBuffer(1, 1, 1, None)
        if self.ragged == "raise" and state.micro_batch % self.split:
            given = f"a batch of {state.micro_batch} pictures cannot be split into {self.split} chunks"
            raise UserError(f"{given}: set split to a divisor of it, or ragged='keep'")
        if state.accumulate > 1:
            raise UserError(f"replay with {state.accumulate} forward passes per update: expected 1, raise micro_batch")
        return ReplayBuffer(state.buffer, self.split, state.replay, self.replay_dtype, ragged=self.ragged)

    def _refill(self, state: State) -> None:
        """Decode again what the buffer held, as it was decoded first."""
        self._wanted = False
        if state.replay == 1 or not self._buffered:
            return
        places, coming = list(self._buffered), self._batches.parts
        orders = {epoch: self._order(state, 0, epoch) for epoch in {epoch for epoch, _ in places}}
        self._batches.parts = [(epoch, orders[epoch].rows[number : number + 1]) for epoch, number in places]
        batches = []
        for (epoch, number), (images, labels) in zip(places, self._decoded(), strict=True):
            done = self.replay_dtype == "float16"
            stored = self.finish(images, state.size, self._generator(epoch, number)).half() if done else images
            batches.append([stored, labels])
        self.replay.load_state_dict({"batches": batches, "generator": None})
        self._batches.parts = coming

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

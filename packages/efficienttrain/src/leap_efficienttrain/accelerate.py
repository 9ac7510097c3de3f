"""Curricula for training loops with Hugging Face Accelerate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from leap_efficienttrain.adapters import Session
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.loader import CurriculumLoader
from leap_efficienttrain.loops import accumulations, batch_size, dataset_length, updates_ahead
from leap_efficienttrain.plan import Plan, State
from leap_shared.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Run", "wrap"]


class Run:
    """A training under Accelerate; see `wrap`.

    Attributes:
        model, optimizer: prepared; to be called in the loop.
        session: size, magnitude and learning rate of every update.
        plan: the curriculum on the data.
        update: updates that are done, of `plan.updates`.
    """

    def __init__(
        self,
        session: Session,
        plan: Plan,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        loader: Any,
        accumulate: Sequence[int],
    ) -> None:
        self.session, self.plan, self.update, self.accelerator = session, plan, 0, accelerator
        self.model, self.optimizer, self.loader, self.accumulate = model, optimizer, loader, accumulate

    def __iter__(self) -> Iterator[State]:
        """The state of each pass over the data that is left, with the model at its size."""
        while self.update < self.plan.updates:
            done = self.update
            yield self.session.enter(done)
            if self.update == done:
                raise UserError("a pass went by without an update: go through batches() in the loop over the run")

    def batches(self) -> Iterator[Any]:
        """The micro-batches that are left of this pass, each with the update's learning rate set.

        Accelerate's `gradient_accumulation_steps` is the state's: use `accelerator.accumulate(run.model)`. A state that
        is saved after `optimizer.step()` goes on behind that update.

        Raises:
            UserError: the loader ends before the pass does.
        """
        state = self.plan.at(self.update)
        first = state.first_update or 0
        start, steps = self.update - first, state.steps or 0
        accumulate = self.accelerator.gradient_accumulation_steps = self.accumulate[state.stage]
        self.accelerator.step = 0
        stream = self._stream(state, start, accumulate)
        for update in range(first + start, first + steps):
            self.session.enter(update)
            for micro in range(accumulate):
                batch = next(stream, None)
                if batch is None:
                    given = f"the loader ended before update {update - first + 1} of a pass that has {steps}"
                    raise UserError(f"{given}: give wrap the number of its pictures as samples")
                if micro + 1 == accumulate:
                    self.update = update + 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """How far the training is."""
        own = {**self.session.state_dict(), "update": self.update}
        return own | {"loader": self.loader.state_dict() if isinstance(self.loader, CurriculumLoader) else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last update.

        Raises:
            UserError: the state is of another curriculum.
        """
        self.session.load_state_dict(state)
        self.update = self.session.update
        if isinstance(self.loader, CurriculumLoader) and state["loader"] is not None:
            self.loader.load_state_dict(state["loader"])

    def _stream(self, state: State, start: int, accumulate: int) -> Iterator[Any]:
        if isinstance(self.loader, CurriculumLoader):
            self.loader.set_state(state, start)
            return iter(self.loader)
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(state.epoch)
        skipped = start * accumulate
        return iter(self.accelerator.skip_first_batches(self.loader, skipped) if skipped else self.loader)


def wrap(
    curriculum: Curriculum,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    loader: Any,
    *,
    samples: int | None = None,
    transform: Any = None,
    ema: Any = None,
    ahead: int | None = None,
    evaluate_at: Literal["base", "stage"] = "base",
    **options: Any,
) -> Run:
    """Train by a curriculum in a loop with Accelerate.

    ```python
    run = wrap(curriculum, accelerator, model, optimizer, loader)
    for state in run:
        for images, labels in run.batches():
            with accelerator.accumulate(run.model):
                accelerator.backward(criterion(run.model(images), labels))
                run.optimizer.step()
                run.optimizer.zero_grad()
    ```

    `accelerator.save_state` and `load_state` stop and go on at any update. Where a size changes parameters, the wrapper
    of DistributedDataParallel is fitted to them.

    Args:
        curriculum: what is trained when.
        accelerator: of this process.
        model: prepared by it or not.
        optimizer: the same.
        loader: a `CurriculumLoader`, for batches, replay and order of every stage; or any loader of micro-batches of
            one size, prepared by the accelerator, whose pictures at the base size become smaller before the model.
        samples: pictures of the training set; the loader's unless given.
        transform: the `LiveTransform` of such another loader.
        ema: moving averages of the model, see `flexible`.
        ahead: updates that such another loader is ahead; worked out from its workers unless given.
        evaluate_at: see `Session`.
        **options: of `flexible`.

    Raises:
        UserError: curriculum, data, model, optimiser and loader do not fit together.
    """
    own = isinstance(loader, CurriculumLoader)
    session = Session(
        curriculum,
        model,
        transform=None if own else transform,
        ema=ema,
        ahead=0 if own else updates_ahead(loader) if ahead is None else ahead,
        evaluate_at=evaluate_at,
        **options,
    )
    prepared = accelerator.prepare_model(model)
    wrapped = prepared if isinstance(prepared, DistributedDataParallel) else None
    given = dataset_length(loader) if samples is None else samples
    plan = session.begin(optimizer, given, accelerator.num_processes, wrapped)
    accumulate = [leg.accumulate for leg in plan.legs]
    if not own and (pictures := batch_size(loader)) is not None:
        accumulate = accumulations(plan, pictures, "the loader's batch size")
    session.attach()
    run = Run(session, plan, accelerator, prepared, accelerator.prepare_optimizer(optimizer), loader, accumulate)
    accelerator.register_for_checkpointing(run)
    return run

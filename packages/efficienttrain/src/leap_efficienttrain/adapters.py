"""A curriculum at work inside somebody else's training loop: what the adapters to other libraries have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.loops import Images, Smaller, downsample, rewrap, set_rate
from leap_efficienttrain.plan import Plan, State
from leap_efficienttrain.sizes import Flexible, flexible
from leap_shared.errors import UserError

__all__ = ["Session"]


class Session:
    """Size, augmentation and learning rate of a model in training, set for any update in any order.

    From `attach` on the model looks after its size itself, whatever loop calls it. In training, pictures that are
    larger than the size are made smaller before they enter. In evaluation the model takes the base size, and returns
    to the same bits before it trains on or is saved. Weights of another stage load, since the model takes their size
    first.

    Args:
        curriculum: what is trained when.
        model: see `flexible`.
        ema: moving averages of it, see `flexible`; they too are evaluated at the base size.
        transform: the `LiveTransform` of the loader, or another with `set`.
        ahead: updates that the loader is ahead of the training. The transform makes pictures of the largest size
            within that reach, so that none is too small when its turn comes.
        evaluate_at: base, or stage: pictures of evaluation too are made as small as the stage's.
        resized: called with every size that the model takes.
        **options: of `flexible`.

    Attributes:
        flexible: the model's size and what moves with it.
        plan: the curriculum on the data; None before `begin`.
        state: of the last update that was entered.

    Raises:
        UserError: the model cannot take a size of the curriculum.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        model: nn.Module,
        *,
        ema: Any = None,
        transform: Any = None,
        ahead: int = 0,
        evaluate_at: Literal["base", "stage"] = "base",
        resized: Callable[[int], None] | None = None,
        **options: Any,
    ) -> None:
        if evaluate_at not in ("base", "stage"):
            raise UserError(f"evaluate_at {evaluate_at!r}: expected base or stage")
        self.curriculum, self.model, self.transform, self.ahead = curriculum, model, transform, ahead
        self.evaluate_at = evaluate_at
        self._ema, self._resized, self._options = ema, resized, options
        self.plan: Plan | None = None
        self.state: State | None = None
        self.update = 0
        self.flexible: Flexible = flexible(model, None, ema, **options)
        self._check_sizes()
        self._optimizers: list[Any] = []
        self._wrapped: nn.Module | None = None
        self._handles: list[Any] = []
        self._views: dict[nn.Module, tuple[Any, list[tuple[nn.Parameter, Tensor, Tensor | None]]]] = {}

    def attach(self) -> None:
        """Let the model look after its size from now on, until `detach`."""
        self.detach()
        averages = self._ema if isinstance(self._ema, list | tuple) else [self._ema]
        networks: list[Any] = [getattr(ema, "module", ema) for ema in averages if ema is not None]
        pairs: list[tuple[Any, Any]] = [(self.model, self.flexible.model), *((each, each) for each in networks)]
        for outer, inner in pairs:
            self._handles += [
                outer.register_forward_pre_hook(self._enter_forward(inner), with_kwargs=True),
                inner.register_state_dict_pre_hook(lambda module, *_: self._leave_base(module)),
                inner.register_load_state_dict_pre_hook(self._take_size()),
            ]

    def detach(self) -> None:
        """Leave the model alone, at the size of its training."""
        self._leave_base()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(
        self, optimizers: Any, samples: int, world: int = 1, wrapped: nn.Module | None = None, rates: bool = True
    ) -> Plan:
        """Take the optimisers along from now on.

        Args:
            optimizers: of the model, one or more.
            samples: pictures of the training set.
            world: processes.
            wrapped: the model in DistributedDataParallel, where there is that.
            rates: whether the curriculum sets their learning rates.

        Raises:
            UserError: the curriculum does not fit the data, or an optimiser holds other parameters.
        """
        several = optimizers if isinstance(optimizers, list | tuple) else [optimizers]
        plain = [_plain(optimizer) for optimizer in several]
        self.flexible = flexible(self.model, plain, self._ema, **{**self._options, "size": self.flexible.size})
        self._optimizers, self._wrapped = plain if rates else [], wrapped
        self.plan = self.curriculum.plan(samples, world)
        return self.plan

    def enter(self, update: int) -> State:
        """Set everything for one update of the whole training, from 0, and return its state.

        Raises:
            UserError: training did not begin.
        """
        if self.plan is None:
            raise UserError("the training did not begin: call begin first")
        self._leave_base()
        self.update, last = update, self.plan.updates - 1
        self.state = state = self.plan.at(min(update, last))
        if self.flexible.size != state.size:
            self._resize(state.size)
        if self.transform is not None:
            reach = range(state.stage, self.plan.at(min(update + self.ahead, last)).stage + 1)
            size = max(leg.stage.size for leg in self.plan.legs if leg.index in reach)
            self.transform.set(size=size, magnitude=state.magnitude)
        set_rate(self._optimizers, self.plan.lr(min(update, last)))
        return state

    def fit(self, images: Images) -> Smaller:
        """Pictures at the size of the present update."""
        size = self.curriculum.base_size if self.state is None else self.state.size
        return downsample(images, size, self.curriculum.downsample)

    def state_dict(self) -> dict[str, Any]:
        """The curriculum, and how far its training is."""
        samples = None if self.plan is None else self.plan.samples
        return {"curriculum": self.curriculum.to_yaml(), "samples": samples, "update": self.update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `update`.

        Raises:
            UserError: another curriculum was trained, or other pictures; says in what they differ.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this curriculum's own warnings were given when it was made
            odd = self.curriculum.differences(Curriculum.from_yaml(state["curriculum"]))
        samples = None if self.plan is None else self.plan.samples
        if samples is not None and samples != state["samples"]:
            odd.append(f"the training set has {samples} pictures, had {state['samples']}")
        if odd:
            raise UserError(f"the checkpoint is of another curriculum ({'; '.join(odd[:5])}): take that one")
        self.update = int(state["update"])

    def _check_sizes(self) -> None:
        stages = enumerate(self.curriculum.stages, 1)
        sizes = [(f"stage {number}", stage.size) for number, stage in stages]
        for where, size in [*sizes, ("the base size", self.curriculum.base_size)]:
            nearest = self.flexible.nearest(size)
            if nearest != (size,):
                needs = f"is not a multiple of {self.flexible.requires}, which {type(self.model).__name__} needs"
                raise UserError(f"{where}: {size} pixels {needs}: take {' or '.join(map(str, nearest))}")

    def _resize(self, size: int) -> None:
        self._after(self.flexible.set_size(size))

    def _after(self, changed: bool) -> None:
        if changed and self._wrapped is not None:
            rewrap(self._wrapped)
        if self._resized is not None and isinstance(self.flexible.size, int):
            self._resized(self.flexible.size)

    def _enter_forward(self, inner: nn.Module) -> Callable[..., Any]:
        own = inner is self.flexible.model

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.state is None:
                return None
            if not module.training and self.evaluate_at == "base":
                self._take_base(inner)
                return None
            return _with_images(self.fit, args, kwargs) if own or not module.training else None

        return before

    def _take_base(self, network: nn.Module) -> None:
        size, base = self.flexible.size, self.curriculum.base_size
        if network in self._views or size in (None, base):
            return
        kept = [(parameter, parameter.data, parameter.grad) for parameter in network.parameters()]
        with torch.inference_mode(False), torch.no_grad():
            view = flexible(network, **{**self._options, "size": size})
            view.set_size(base)
        self._views[network] = (view, kept)

    def _leave_base(self, network: nn.Module | None = None) -> None:
        for each in [network] if network is not None else list(self._views):
            view, kept = self._views.pop(each, (None, []))
            if view is None:
                continue
            with torch.inference_mode(False), torch.no_grad():
                changed = view.set_size(self.flexible.size)
                for parameter, values, gradient in kept:
                    parameter.data, parameter.grad = values, gradient
            if changed and each is self.flexible.model and self._wrapped is not None:
                rewrap(self._wrapped)

    def _take_size(self) -> Callable[..., None]:
        base, sizes = self.curriculum.base_size, [stage.size for stage in self.curriculum.stages]

        def before(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
            self._leave_base(module)
            if _fits(module, state, prefix):
                return
            own, size = module is self.flexible.model, self.flexible.size
            network = self.flexible if own else flexible(module, **{**self._options, "size": size})
            for other in dict.fromkeys([base, *sizes]):
                network.set_size(other)
                if _fits(module, state, prefix):
                    break
            else:
                network.set_size(size or base)  # torch says what does not fit
            if own:
                self._after(network.size != size)

        return before


def _plain(optimizer: Any) -> Optimizer:
    """The optimiser inside the wrappers of accelerate and Lightning."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


def _fits(module: nn.Module, state: Mapping[str, Any], prefix: str) -> bool:
    own = {prefix + name: parameter.shape for name, parameter in module.named_parameters()}
    return all(shape == state[name].shape for name, shape in own.items() if isinstance(state.get(name), Tensor))


def _with_images(
    change: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model with its pictures changed: the first four-dimensional tensor of floats."""

    def is_images(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()

    for place, value in enumerate(args):
        if is_images(value):
            return (*args[:place], change(value), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if is_images(value):
            return args, {**kwargs, name: change(value)}
    return args, kwargs

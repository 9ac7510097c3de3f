"""Modules and tensors as contenders: where they lie, and one call of them in inference or in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["copy_with", "dtype_on", "infer", "model_call", "noise", "on_gpu", "placed", "training_step"]

Model = TypeVar("Model", bound=nn.Module)
Layer = TypeVar("Layer", bound=nn.Module)


def on_gpu(device: torch.device) -> bool:
    """Whether measurements are those of a GPU."""
    return device.type == "cuda"


def dtype_on(device: torch.device) -> torch.dtype:
    """What is measured on a device: bfloat16 on GPUs, else float32."""
    return torch.bfloat16 if on_gpu(device) else torch.float32


def placed(module: Model, device: torch.device) -> Model:
    """The module in evaluation mode, on the device and in its dtype."""
    return module.eval().to(device, dtype_on(device))


def noise(device: torch.device, seed: int, *shape: int) -> Tensor:
    """Normal numbers, the same on every device but for its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype_on(device))


def infer(function: Callable[..., Any], *args: object) -> Any:
    """Call a function in inference mode."""
    with torch.inference_mode():
        return function(*args)


def training_step(function: Callable[[], Any], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward pass of a function that gives a tensor or a tuple, with fresh gradients for `inputs`."""

    def outputs() -> tuple[Tensor, ...]:
        found = function()
        return found if isinstance(found, tuple) else (found,)

    gradients = [torch.ones_like(out) for out in outputs()]

    def step() -> None:
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(outputs(), gradients)

    return step


def model_call(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A whole model in inference, compiled on a GPU.

    One forward method is compiled for few models, and the next would run uncompiled: call `torch.compiler.reset` in
    between.
    """
    # Of a whole module torch.compile warns when its operations are counted.
    return partial(infer, torch.compile(model.forward, dynamic=False) if on_gpu(images.device) else model, images)


def copy_with(model: Model, kind: type[Layer], make: Callable[[Layer], nn.Module]) -> Model:
    """A copy of a model in which `make` replaces the layers of a kind."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, kind):
            parent, _, own = name.rpartition(".")
            setattr(copied.get_submodule(parent), own, make(module))
    return copied

"""Many small networks of one shape, run and trained as one: flat parameters, explicit backward passes, fused Adam.

The networks of offline reinforcement learning are so small that autograd's bookkeeping costs as much as a layer. So a
forward pass leaves a tape, the gradient of the loss with respect to the outputs (which an algorithm writes beside its
equation, or takes from autograd over a few small tensors) goes back along it, and all parameters of all networks are
one tensor, for one Adam and one Polyak step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.optim.adam import adam

__all__ = ["Adam", "Initialisation", "StackedMLP", "Tape", "orthogonal", "torch_default"]

LARGE_LAYER = 1 << 15  # parameters of a layer from which single products beat a batched one on CPUs
relu_backward = torch.ops.aten.threshold_backward.grad_input

Layer = tuple[Float[Tensor, "fan_in fan_out"], Float[Tensor, " fan_out"]]
Initialisation = Callable[[torch.Generator, int, int, bool], Layer]


def torch_default(generator: torch.Generator, fan_in: int, fan_out: int, last: bool) -> Layer:  # noqa: ARG001 - a kind
    """Weights and biases of `torch.nn.Linear`: uniform within 1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    numbers = [torch.rand(shape, generator=generator) * 2 * bound - bound for shape in ((fan_in, fan_out), (fan_out,))]
    return numbers[0], numbers[1]


def orthogonal(generator: torch.Generator, fan_in: int, fan_out: int, last: bool) -> Layer:  # noqa: ARG001 - a kind
    """Orthogonal weights of gain sqrt(2), zero biases."""
    weight = torch.empty(fan_in, fan_out)
    torch.nn.init.orthogonal_(weight, math.sqrt(2), generator=generator)
    return weight, torch.zeros(fan_out)


class Unit(NamedTuple):
    """Parameters and gradients that one matrix product serves: a single network's, or a whole stack's."""

    weights: list[Tensor]
    biases: list[Tensor]
    weight_gradients: list[Tensor]
    bias_gradients: list[Tensor]


class Tape(NamedTuple):
    """What a backward pass needs of a forward pass: for each unit the inputs of its layers."""

    units: list[Unit]
    inputs: list[list[Tensor]]
    scale: float
    """Of what dropout kept."""


class StackedMLP:
    """`len(seeds)` independent ReLU networks; each is initialised from its own seed.

    Large networks on a CPU fill it one by one, so there each is a unit of its own; elsewhere the stack is one unit.

    Args:
        widths: input, hidden and output widths.
        seeds: one per network.
        device: where they live.
        initialisation: makes one layer.
    """

    def __init__(
        self,
        widths: Sequence[int],
        seeds: Sequence[int],
        device: str | torch.device = "cpu",
        initialisation: Initialisation = torch_default,
    ) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parts: list[Tensor] = []
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            last = index == len(widths) - 2
            layers = [initialisation(generator, fan_in, fan_out, last) for generator in generators]
            parts += [torch.stack([weight for weight, _ in layers]), torch.stack([bias[None] for _, bias in layers])]
        self.widths = tuple(widths)
        self._adopt([part.shape for part in parts], torch.cat([part.flatten() for part in parts]).to(device))

    def _adopt(self, shapes: Sequence[torch.Size], flat: Tensor) -> None:
        self._shapes, self.flat, self.gradient = shapes, flat, torch.zeros_like(flat)
        parts, gradients = self._views(self.flat), self._views(self.gradient)
        widest = max(math.prod(shape[1:]) for shape in shapes)
        self._separate = flat.device.type == "cpu" and widest >= LARGE_LAYER
        self._stack = Unit(parts[::2], parts[1::2], gradients[::2], gradients[1::2])
        self._units = [Unit(*([x[n] for x in group] for group in self._stack)) for n in range(len(self))]

    def __len__(self) -> int:
        return self._shapes[0][0]

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, [shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def copy(self) -> StackedMLP:
        """Networks with the same parameters, such as targets."""
        twin = object.__new__(StackedMLP)
        twin.widths = self.widths
        twin._adopt(self._shapes, self.flat.clone())
        return twin

    def __call__(
        self, inputs: Float[Tensor, "networks batch width"], chosen: slice = slice(None)
    ) -> Float[Tensor, "networks batch output"]:
        """Outputs of the `chosen` networks, each for its own batch."""
        return self.forward(inputs, chosen)[0]

    def forward(
        self,
        inputs: Float[Tensor, "networks batch width"],
        chosen: slice = slice(None),
        kept: Sequence[Bool[Tensor, "networks batch _"]] = (),
        dropout: float = 0.0,
    ) -> tuple[Float[Tensor, "networks batch output"], Tape]:
        """Outputs and the tape for `backward`.

        Args:
            inputs: a batch for each of the `chosen` networks.
            chosen: which networks run.
            kept: with `dropout`, which units of each hidden layer stay.
            dropout: probability that a unit does not; what stays is scaled by 1 / (1 - dropout).
        """
        if self._separate:
            units, parts = self._units[chosen], list(inputs.unbind())
        else:
            units, parts = [Unit(*([x[chosen] for x in group] for group in self._stack))], [inputs]
        affine = torch.addmm if self._separate else torch.baddbmm
        outputs, layers = [], []
        for place, (unit, part) in enumerate(zip(units, parts, strict=True)):
            x = part
            layers.append([x])
            for weight, bias in zip(unit.weights, unit.biases, strict=True):
                x = affine(bias, x, weight)
                if len(layers[-1]) < len(unit.weights):
                    x.relu_()
                    if dropout:
                        mask = kept[len(layers[-1]) - 1]
                        x.mul_(mask[place] if self._separate else mask).div_(1 - dropout)
                    layers[-1].append(x)
            outputs.append(x)
        return torch.stack(outputs) if self._separate else outputs[0], Tape(units, layers, 1 / (1 - dropout))

    def backward(
        self,
        tape: Tape,
        gradient: Float[Tensor, "networks batch output"],
        *,
        weights: bool = True,
        inputs: bool = False,
    ) -> Float[Tensor, "networks batch width"]:
        """Send the gradient of a loss with respect to the outputs back along the tape.

        Args:
            tape: of `forward`.
            gradient: with respect to the outputs.
            weights: write the parameters' gradients into `self.gradient`.
            inputs: return the gradient with respect to the inputs (else it is not computed, and `gradient` comes back).
        """
        product = torch.mm if self._separate else torch.bmm
        results = []
        for unit, layers, part in zip(tape.units, tape.inputs, gradient if self._separate else [gradient], strict=True):
            g = part
            for index in reversed(range(len(layers))):
                if weights:
                    product(layers[index].mT, g, out=unit.weight_gradients[index])
                    torch.sum(g, -2, keepdim=True, out=unit.bias_gradients[index])
                if index or inputs:
                    g = product(g, unit.weights[index].mT)
                if index:
                    relu_backward(g, layers[index], 0, grad_input=g)
                    if tape.scale != 1.0:
                        g.mul_(tape.scale)
            results.append(g)
        if not inputs:
            return gradient
        return torch.stack(results) if self._separate else results[0]

    def follow(self, online: StackedMLP, rate: float) -> None:
        """Move these parameters towards those of `online`: θ' ← rate θ + (1 - rate) θ'."""
        self.flat.lerp_(online.flat, rate)

    def layers(self, network: int) -> list[Layer]:
        """Views of one network's weights (fan_in, fan_out) and biases (fan_out,)."""
        unit = self._units[network]
        return [(weight, bias[0]) for weight, bias in zip(unit.weights, unit.biases, strict=True)]

    def export(self, network: int, names: Sequence[str]) -> dict[str, Tensor]:
        """{name.weight, name.bias} of one network in the layout of `torch.nn.Linear`; views, so writing works too."""
        layers = zip(names, self.layers(network), strict=True)
        return {f"{name}.{leaf}": part for name, (w, b) in layers for leaf, part in (("weight", w.T), ("bias", b))}

    def load(self, network: int, names: Sequence[str], state: Mapping[str, ArrayLike | Tensor]) -> None:
        """Take over what `export` gives."""
        for key, own in self.export(network, names).items():
            own.copy_(torch.as_tensor(state[key]))

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters."""
        return {"flat": self.flat}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the parameters in place."""
        self.flat.copy_(state["flat"])


class Adam:
    """Adam over flat tensors of parameters and gradients, as `torch.optim.Adam(fused=True)` computes it."""

    _adam: Callable[..., None] = staticmethod(adam)

    def __init__(self, parameters: Tensor, gradient: Tensor, learning_rate: float = 3e-4) -> None:
        self.parameters, self.gradient, self.learning_rate = parameters, gradient, learning_rate
        self.first, self.second = torch.zeros_like(parameters), torch.zeros_like(parameters)
        self.steps = torch.zeros((), device=parameters.device)

    @classmethod
    def of(cls, network: StackedMLP, learning_rate: float = 3e-4) -> Adam:
        """Optimiser of all of a stack's parameters."""
        return cls(network.flat, network.gradient, learning_rate)

    def step(self, learning_rate: float | Tensor | None = None) -> None:
        """One update with the gradient that is there."""
        rate: Any = self.learning_rate if learning_rate is None else learning_rate
        state: list[Any] = [[self.parameters], [self.gradient], [self.first], [self.second], [], [self.steps]]
        numbers: Any = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "lr": rate}
        self._adam(*state, fused=True, amsgrad=False, maximize=False, **numbers)

    def reset(self) -> None:
        """Forget the moments and the number of steps."""
        for part in (self.first, self.second, self.steps):
            part.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and number of steps."""
        return {"first": self.first, "second": self.second, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state in place."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])

"""Stacked networks: forward and backward passes against plain modules and autograd, Adam against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leap_shared.offline.networks import Adam, StackedMLP, orthogonal

NAMES = ("l1", "l2", "l3")
ROUNDING = 1e-5  # of float32 sums over 256 terms of order one
widths = st.sampled_from([(3, 8, 8, 2), (5, 256, 256, 1)])  # one unit for the stack, and one for each network


def modules(stack: StackedMLP) -> list[nn.Sequential]:
    made = []
    for n in range(len(stack)):
        layers = [nn.Linear(w.shape[0], w.shape[1]) for w, _ in stack.layers(n)]
        parts = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
        for layer, (weight, bias) in zip(layers, stack.layers(n), strict=True):
            layer.load_state_dict({"weight": weight.T, "bias": bias})
        made.append(nn.Sequential(*parts))
    return made


@given(widths, st.integers(1, 3), st.integers(1, 7), st.integers(0, 99))
def test_outputs_and_all_gradients_are_autograds(sizes, count, batch, seed) -> None:
    stack = StackedMLP(sizes, range(seed, seed + count))
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, batch, sizes[0], generator=generator)
    gradient = torch.randn(count, batch, sizes[-1], generator=generator)
    outputs, tape = stack.forward(inputs)
    to_inputs = stack.backward(tape, gradient, inputs=True)
    plain = modules(stack)
    for n, module in enumerate(plain):
        x = inputs[n].clone().requires_grad_()
        y = module(x)
        torch.testing.assert_close(outputs[n], y.detach(), atol=ROUNDING, rtol=ROUNDING)
        y.backward(gradient[n])
        torch.testing.assert_close(to_inputs[n], x.grad, atol=ROUNDING, rtol=ROUNDING)
    twin = stack.copy()
    twin.flat.copy_(stack.gradient)
    for n, module in enumerate(plain):
        for layer, (weight, bias) in zip(module[::2], twin.layers(n), strict=True):
            torch.testing.assert_close(weight.T, layer.weight.grad, atol=10 * ROUNDING, rtol=10 * ROUNDING)
            torch.testing.assert_close(bias, layer.bias.grad, atol=10 * ROUNDING, rtol=10 * ROUNDING)


@given(widths)
def test_chosen_networks_are_those_of_the_whole_stack(sizes) -> None:
    stack = StackedMLP(sizes, range(4))
    inputs = torch.randn(4, 3, sizes[0])
    torch.testing.assert_close(stack(inputs[::2], slice(0, None, 2)), stack(inputs)[::2])


def test_a_pass_to_the_inputs_alone_leaves_the_parameters_gradients() -> None:
    stack = StackedMLP((3, 4, 1), [0])
    outputs, tape = stack.forward(torch.randn(1, 5, 3))
    stack.backward(tape, torch.ones_like(outputs), weights=False, inputs=True)
    assert not stack.gradient.any()


@given(widths)
def test_a_network_depends_on_its_own_seed_alone(sizes) -> None:
    alone, among = StackedMLP(sizes, [7]), StackedMLP(sizes, [1, 7])
    for one, other in zip(alone.layers(0), among.layers(1), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_default_initialisation_is_within_torchs_bounds() -> None:
    (weight, bias), *_ = StackedMLP((16, 64, 1), [0]).layers(0)
    assert weight.abs().max() <= 0.25
    assert bias.abs().max() <= 0.25
    assert weight.std() == pytest.approx(0.5 / 12**0.5, rel=0.05)


def test_orthogonal_initialisation_has_gain_root_two_and_no_bias() -> None:
    for weight, bias in StackedMLP((8, 8, 8), [0], initialisation=orthogonal).layers(0):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
        assert not bias.any()


@given(widths, st.sampled_from([0.1, 0.5]))
def test_dropout_scales_what_stays_and_drops_gradients_with_the_units(sizes, dropout) -> None:
    stack = StackedMLP(sizes, [0])
    inputs = torch.randn(1, 4, sizes[0])
    kept = [torch.rand(1, 4, width, generator=torch.Generator().manual_seed(1)) >= dropout for width in sizes[1:-1]]
    outputs, tape = stack.forward(inputs, kept=kept, dropout=dropout)
    x = inputs[0].clone().requires_grad_()
    layers = stack.layers(0)
    h = x
    for (weight, bias), mask in zip(layers[:-1], kept, strict=True):
        h = (h @ weight + bias).relu() * mask[0] / (1 - dropout)
    y = h @ layers[-1][0] + layers[-1][1]
    torch.testing.assert_close(outputs[0], y.detach(), atol=ROUNDING, rtol=ROUNDING)
    y.sum().backward()
    to_inputs = stack.backward(tape, torch.ones_like(outputs), inputs=True)
    torch.testing.assert_close(to_inputs[0], x.grad, atol=ROUNDING, rtol=ROUNDING)


def test_export_is_torchs_linear_layout_and_load_takes_it() -> None:
    one, other = StackedMLP((3, 4, 4, 2), [0, 1]), StackedMLP((3, 4, 4, 2), [2, 3])
    state = one.export(1, NAMES)
    assert state["l1.weight"].shape == (4, 3)
    other.load(0, NAMES, {key: value.numpy() for key, value in state.items()})
    inputs = torch.randn(2, 5, 3)
    assert torch.equal(other(inputs)[0], one(inputs.flip(0))[1])


def test_following_is_polyak_averaging() -> None:
    slow, fast = StackedMLP((2, 2, 1), [0]), StackedMLP((2, 2, 1), [1])
    expected = 0.1 * fast.flat + 0.9 * slow.flat
    slow.follow(fast, 0.1)
    torch.testing.assert_close(slow.flat, expected)


def test_adam_takes_torchs_steps_and_goes_on_from_its_state() -> None:
    flat = torch.randn(50)
    plain = nn.Parameter(flat.clone())
    theirs = torch.optim.Adam([plain], lr=1e-3)
    gradient = torch.zeros(50)
    ours = Adam(flat, gradient, 1e-3)
    for step in range(6):
        gradient.copy_(torch.sin(flat + step))
        plain.grad = torch.sin(plain.detach() + step)
        ours.step()
        theirs.step()
        if step == 2:
            again = Adam(flat, gradient, 1e-3)
            again.load_state_dict(ours.state_dict())
            ours = again
    torch.testing.assert_close(flat, plain.detach(), atol=1e-6, rtol=1e-6)

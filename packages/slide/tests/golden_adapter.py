"""The golden cases' interface on the public API of leap_slide, and nothing else."""

from __future__ import annotations

from typing import Any

import timm
import torch

import leap_slide as ls
from leap_shared.checkpoints import load_into

FAMILIES = {"swin": ls.SlideSwin, "pvt": ls.SlidePVT, "pvt_v2": ls.SlidePVTv2}


def _tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.as_tensor(value) for key, value in state.items()}


def attention(x: Any, state: dict[str, Any], hw: tuple[int, int], config: dict[str, Any], cotangent: Any = None) -> Any:
    layer = ls.SlideAttention(**config).eval()
    load_into(layer, _tensors(state))
    x = torch.as_tensor(x).requires_grad_()
    output = layer(x, hw)
    if cotangent is not None:
        output.backward(torch.as_tensor(cotangent))
    return output, x.grad, {key: value.grad for key, value in layer.named_parameters()}


def model(x: Any, state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    options = dict(config)
    if "model" in options:
        network = timm.create_model(options.pop("model"), **options)
    else:
        network = FAMILIES[options.pop("family")](**options)
    load_into(network.eval(), _tensors(state))
    found = {}
    for number, facts in enumerate(network.feature_info, 1):
        last = list(network.get_submodule(facts["module"]).children())[-1]
        last.register_forward_hook(lambda *args, name=f"stage_{number}": found.update({name: args[2]}))
    with torch.no_grad():
        tokens = network.forward_features(torch.as_tensor(x))
        pooled = network.forward_head(tokens, pre_logits=True)
        logits = network.forward_head(tokens)
    parameters = sum(value.numel() for value in network.parameters())
    return {"logits": logits, "pooled": pooled, "parameters": parameters, **found}

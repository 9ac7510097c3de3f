"""The golden cases' interface on the public API of leap_flatten, and nothing else."""

from __future__ import annotations

from typing import Any

import timm

import leap_flatten as lf
from leap_flatten import models, recipes, visualize
from leap_flatten.checkpoints import resize_tables
from leap_shared.checkpoints import load_into
from leap_shared.vision.bodies import Site

RENAMED = {"depth": "depths", "split_size": "split_sizes"}


def _layer(c: dict[str, Any]) -> Any:
    family = c["family"]
    options = {key: c[key] for key in ("focusing_factor", "kernel_size", "denominator", "qkv_bias") if key in c}
    if family == "swin":
        return lf.FocusedLinearAttention(c["dim"], c["num_heads"], tuple(c["window"]), **options)
    if family in ("pvt", "pvt_v2"):
        size, ratio = (c["H"], c["W"]), c.get("sr_ratio", 1)
        return lf.PVTFocusedLinearAttention(c["dim"], c["num_heads"], size, ratio, **options)
    side = c.get("resolution") or c.get("reso")
    if family == "cswin_block":
        site = Site(0, 0, c["dim"], c["num_heads"], (side, side), plugged=c["attn_type"] == "L")
        return models.CSWinBlock(site, models.branch_attention(**options) if site.plugged else None, c["split_size"])
    if family.endswith("_block"):
        ratios = {"mlp_ratio": c["mlp_ratio"], "sr_ratio": c.get("sr_ratio", 1), "norm_eps": 1e-6}
        site = Site(0, 0, c["dim"], c["num_heads"], (c["H"], c["W"]), plugged=True, **ratios)
        kind = models.PVTv2Block if family == "pvt_v2_block" else models.Block
        return kind(site, models.pvt_attention(**options)(site))
    if family == "cswin_lepe":
        return models.LePEAttention(Site(0, 0, c["dim"], c["num_heads"], _stripe(c)))
    return lf.CSWinFocusedLinearAttention(c["dim"], c["num_heads"], _stripe(c), **options)


def _stripe(c: dict[str, Any]) -> tuple[int, int]:
    side, split = c["resolution"], c["split_size"]
    return {-1: (side, side), 0: (side, split), 1: (split, side)}[c["idx"]]


def layer(constructor: dict[str, Any], state: dict[str, Any], inputs: dict[str, Any]) -> Any:
    module = _layer(constructor).eval()
    load_into(module, state)
    (x,) = inputs.values()
    family, hw = constructor["family"], None
    if family in ("cswin", "cswin_lepe"):
        size, hw = (constructor["resolution"],) * 2, _stripe(constructor)
        stacked = models.partition(x.flatten(0, 1).unflatten(1, size), hw).unflatten(0, (3, -1))
        out = models.merge(module(stacked, hw), hw, size).flatten(1, 2)
    else:
        if family == "swin":
            hw = tuple(constructor["window"])
        elif family == "cswin_block":
            hw = (constructor["reso"],) * 2
        else:
            hw = (constructor["H"], constructor["W"])
        out = module(x, hw)
    return out, dict(module.named_parameters())


def _model(constructor: dict[str, Any]) -> Any:
    options = {key: value for key, value in constructor.items() if key not in ("model", "family")}
    name = constructor.get("model") or constructor["family"]
    if name in lf.VARIANTS:
        return timm.create_model(name, **options).eval()
    if name in ("deit", "flatten_deit"):
        return lf.FlattenDeiT(**options).eval()
    kinds = {"swin": lf.FlattenSwin, "pvt": lf.FlattenPVT, "pvt_v2": lf.FlattenPVTv2, "cswin": lf.FlattenCSWin}
    options = {RENAMED.get(key, key): value for key, value in options.items() if key != "patch_size"}
    return kinds[name](**options).eval()


def model(constructor: dict[str, Any], state: dict[str, Any], image: Any) -> dict[str, Any]:
    network = _model(constructor)
    load_into(network, state)
    tokens = network.forward_features(image)
    stages = [] if isinstance(network, lf.FlattenDeiT) else _stages(network, image)
    return {
        "logits": network.forward_head(tokens),
        "pooled": network.forward_head(tokens, pre_logits=True),
        "stages": stages,
        "parameters": sum(p.numel() for p in network.parameters()),
    }


def _stages(network: Any, image: Any) -> list[Any]:
    found: list[Any] = []
    for facts in network.feature_info:
        last = list(network.get_submodule(facts["module"]).children())[-1]
        last.register_forward_hook(lambda module, args, output: found.append(output))
    network(image)
    return found


def resized_model(constructor: dict[str, Any], target: dict[str, Any], state: dict[str, Any], image: Any) -> Any:
    network = _model({**constructor, **target})
    resized = resize_tables(network, state)
    load_into(network, resized)
    return {"logits": network(image), "state": resized}


def reference_attention_map(query: Any, key: Any, kernel: Any) -> Any:
    return visualize.reference_attention_map(query, key, kernel)


def learning_rates(model: str, batch: int, steps_per_epoch: int, steps: list[int]) -> Any:
    rates = recipes.get(model).learning_rates(batch, steps_per_epoch)
    return [rates[0], *rates.at(steps)]


def optimiser_groups(model: str) -> dict[str, int]:
    network = timm.create_model(model)
    groups = recipes.get(model).parameter_groups(network)
    frozen = [p for p in network.parameters() if not p.requires_grad]
    spared = [p for group in groups if not group["weight_decay"] for p in group["params"]] + frozen
    total = sum(len(group["params"]) for group in groups) + len(frozen)
    return {"no_decay": len(spared), "total": total, "no_decay_numel": sum(p.numel() for p in spared)}

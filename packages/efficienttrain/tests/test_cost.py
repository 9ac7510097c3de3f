"""What a training is predicted to cost."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from leap_efficienttrain.cost import gmac, step_seconds
from leap_efficienttrain.curriculum import Curriculum
from leap_shared.errors import UserError

# of the papers' tables: compute at 300 ordinary epochs over that of 200 equivalent epochs
SPEEDUPS = {
    "resnet50": (1.499, 1.49),
    "convnext_tiny": (1.501, 1.49),
    "deit_tiny_patch16_224": (1.577, 1.56),
    "deit_small_patch16_224": (1.534, 1.52),
    "swin_tiny": (1.517, 1.51),
    "CSWin_64_12211_tiny_224": (1.530, 1.52),
}


@pytest.mark.parametrize("name", SPEEDUPS)
def test_predicted_speed_ups_are_the_published_ones(name):
    prediction = Curriculum.preset(f"et++:{name}", 200).table(name)
    counted, published = SPEEDUPS[name]
    assert prediction.speedup == pytest.approx(counted, abs=5e-3)
    assert prediction.speedup == pytest.approx(published, rel=0.015)


def test_the_first_release_saves_as_much_as_published():
    assert Curriculum.preset("et:iccv").table("swin_tiny").speedup == pytest.approx(1.545, abs=2e-3)


def test_the_loader_must_deliver_what_the_smaller_model_takes():
    table = Curriculum.preset("et++", 200).table("swin_tiny", images_per_second=1000)
    assert table.demand == pytest.approx(1000 * 4.491 / 0.804, rel=2e-3)
    relative = Curriculum.preset("et++:swin_tiny", 200, replay=True).table("swin_tiny")
    assert relative.stages[0].demand == pytest.approx(4.491 / 0.804 / 2, rel=2e-3)


def test_the_shares_of_the_stages_make_up_the_whole():
    table = Curriculum.preset("et++", 200).table("resnet50")
    assert sum(row.share for row in table.stages) == pytest.approx(1)
    assert (table.passes, table.updates) == (454, 454 * 312)


def test_measured_seconds_change_the_prediction():
    seconds = {96: 0.5, 160: 0.6, 224: 1.0}
    table = Curriculum.preset("et++", 200).table("resnet50", seconds=seconds)
    spent = 217 * 0.5 + 157 * 0.6 + 80 * 1.0
    assert table.measured_speedup == pytest.approx(300 / spent)
    assert table.stages[0].demand == 2.0
    assert "by the steps timed on this machine" in str(table)


def test_a_printed_prediction_is_a_table():
    lines = str(Curriculum.preset("et++", 200).table("swin_tiny")).splitlines()
    assert len(lines) == 12
    assert lines[0].split()[:3] == ["stage", "size", "randaug"]
    assert "454 passes over the data" in lines[-1]
    assert "1.517x less" in lines[-1]


@pytest.mark.parametrize(("name", "size", "published"), [("swin_tiny", 224, 4.491), ("swin_tiny", 96, 0.804)])
def test_operations_are_counted_by_size(name, size, published):
    assert gmac(name, size) == pytest.approx(published, abs=1e-3)


def test_a_model_is_counted_as_it_is_and_stays_so():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=3)
    shape = model.pos_embed.shape
    assert gmac(model, 96) > gmac(model, 64) > 0
    assert model.pos_embed.shape == shape


def test_a_network_of_ones_own_is_counted():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    assert gmac(network, 32) == pytest.approx((32 * 32 * 8 * 27 + 16) / 1e9)


def test_steps_are_timed():
    assert step_seconds("test_vit", 160, 1, torch.device("cpu"), repeats=1) > 0


@pytest.mark.parametrize(
    ("options", "text"),
    [({"baseline_epochs": 0}, "positive"), ({"images_per_second": -1}, "positive"), ({"model": "swim"}, "unknown")],
)
def test_impossible_predictions_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        Curriculum.preset("et++", 200).table(**{"model": "resnet50", **options})

"""What the planner says of a step is what torch's allocator would hand out, up to 3% more and never less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.simulation.settings import FAMILIES, IN_HOST_MEMORY, SETTINGS, SHARED, Setting

Measured = Callable[..., list[dict[str, Any]]]
OFFLOADED = next(setting for setting in SETTINGS if setting.offload)


def check(found: dict[str, Any]) -> None:
    share = found["planned_over_counted"]
    print(f"{found['name']}: {found['recomputed']} of {found['layers']} layers recomputed, {share:.4f}")
    assert 1 <= share <= 1.03, found


@pytest.mark.slow
def test_the_smallest_plan_of_7b_holds(measured: Measured) -> None:
    found = measured("depth", [OFFLOADED])[0]
    assert (found["layers"], found["recomputed"], found["offloaded"]) == (32, 31, True)
    check(found)


@pytest.mark.more
def test_every_setting_of_the_table_holds(measured: Measured) -> None:
    others = [setting for setting in SETTINGS if setting is not OFFLOADED]
    for found in measured("depth", others):
        check(found)


@pytest.mark.more
def test_plans_with_weights_in_host_memory_hold(measured: Measured) -> None:
    found = measured("depth", IN_HOST_MEMORY)
    assert [(each["recomputed"], each["offloaded"], each["host_layers"]) for each in found] == [
        (31, True, 8),
        (39, True, 12),
    ]
    for each in found:
        check(each)


@pytest.mark.more
def test_samples_that_share_images_need_less(measured: Measured) -> None:
    found = measured("depth", SHARED)
    for each in found:
        check(each)
    peaks = [each["counted_bytes"] for each in found]
    assert peaks == sorted(peaks, reverse=True)
    print([round(peak / 2**30, 2) for peak in peaks])


@pytest.mark.more
def test_models_of_other_families_hold(measured: Measured) -> None:
    settings = [Setting(name, shape=name, memory_gb=11.7) for name in FAMILIES]
    for found in measured("depth", settings):
        check(found)


@pytest.mark.more
def test_few_layers_give_the_count_of_all_layers(measured: Measured) -> None:
    setting = replace(OFFLOADED, name="whole")
    whole, few = measured("whole", [setting])[0], measured("depth", [setting])[0]
    assert few["counted_bytes"] == pytest.approx(whole["counted_bytes"], rel=0.001)

"""What the planner says of a step is what torch's allocator would hand out, up to 3% more and never less."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.simulation.settings import FAMILIES, IN_HOST_MEMORY, SETTINGS, SHARED, TILED, Setting

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
def test_weights_in_host_memory_save_what_is_planned(measured: Measured) -> None:
    """Rows of 1,024 tokens with 8-bit states are planned 3.1% above the count with all weights on the card too."""
    on_card = [replace(setting, offload=True, memory_gb=24) for setting in IN_HOST_MEMORY]
    found, without = measured("depth", IN_HOST_MEMORY), measured("depth", on_card)
    ways = [(each["recomputed"], each["offloaded"], each["host_layers"]) for each in found]
    assert ways == [(31, True, 8), (39, True, 12)]
    for less, more in zip(found, without, strict=True):
        print(f"{less['name']}: {less['counted_bytes'] / 2**30:.2f} GiB, {less['planned_over_counted']:.4f}")
        planned, counted = (more[name] - less[name] for name in ("planned_bytes", "counted_bytes"))
        assert planned == pytest.approx(counted, rel=0.001)
        assert 1 <= less["planned_over_counted"] <= 1.04


@pytest.mark.more
def test_samples_that_share_images_need_less(measured: Measured) -> None:
    found = measured("depth", SHARED)
    for each in found:
        check(each)
    peaks = [each["counted_bytes"] for each in found]
    assert peaks == sorted(peaks, reverse=True)
    print([round(peak / 2**30, 2) for peak in peaks])


@pytest.mark.more
def test_a_llava_1_6_holds(measured: Measured) -> None:
    for found in measured("depth", TILED):
        check(found)


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

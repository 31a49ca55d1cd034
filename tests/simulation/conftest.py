"""Simulations on a CUDA card that is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from tests.simulation.launch import NotHereError, build_guard, simulate
from tests.simulation.settings import Setting

Simulate = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def fake_cuda() -> Simulate:
    """Run jobs in a process that believes in a card; skip where this machine cannot."""
    try:
        build_guard()
    except NotHereError as error:
        pytest.skip(str(error))
    return simulate


@pytest.fixture(scope="session")
def measured(fake_cuda: Simulate) -> Callable[..., list[dict[str, Any]]]:
    """Measure settings, one after the other in one process: `measured("depth", [setting])`."""

    def run(kind: str, settings: list[Setting]) -> list[dict[str, Any]]:
        return fake_cuda([{"kind": kind, "setting": asdict(setting)} for setting in settings])

    return run

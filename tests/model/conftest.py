"""Small language models of every family, and their bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_llava.model.start import Base, prepare_base
from tests.model.small_families import ALL, TOWER_KINDS, make_llm, make_tower, section


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every language model and tower."""
    folder = tmp_path_factory.mktemp("families")
    for family in ALL:
        make_llm(folder / family, family)
    for kind in TOWER_KINDS:
        make_tower(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def base(made: Path) -> Callable[[str, str], Base]:
    """Gives the base of a family and a tower."""
    return lambda family, tower: prepare_base(section(made / family, made / tower), 0)

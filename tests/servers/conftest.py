"""A finished run of the demo, merged, and the folder with the servers."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console
from servers.started import servers

from lora_llava.publishing.merge import merge


@pytest.fixture(scope="session")
def run() -> Path:
    """Return a finished run of the demo, which LORA_LLAVA_DEMO_RUN names."""
    servers()
    folder = os.environ.get("LORA_LLAVA_DEMO_RUN")
    if not folder:
        pytest.skip("LORA_LLAVA_DEMO_RUN names no finished run of demo_scienceqa_qlora")
    return Path(folder)


@pytest.fixture(scope="session")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run merged in float32."""
    folder = tmp_path_factory.mktemp("demo") / "merged"
    merge(run, folder, dtype="float32", console=Console(file=io.StringIO()))
    return folder

"""Measures of finished parts on disk, so that a stopped inspection resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from lora_llava.evaluation.inspection.row_measures import Measures

_ARRAYS = tuple(each.name for each in fields(Measures) if each.name not in ("images", "problems"))


class KeptMeasures:
    """The measures of one inspection, a file for each part of its rows.

    Args:
        folder: The folder of the inspection's output; the files are in `inspect.HASH.partial` beneath it.
        key: All that the measures depend on, as JSON values.
    """

    def __init__(self, folder: Path, key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
        self.folder = folder / f"inspect.{digest[:8]}.partial"

    def load(self, part: int, names: Sequence[Any]) -> Measures | None:
        """Return the measures of a part; None if there are none, or the file is damaged.

        Args:
            part: Number of the part.
            names: Names of the part's images, in the order in which they were saved.
        """
        try:
            with np.load(self._file(part), allow_pickle=False) as found:
                arrays = {name: found[name] for name in _ARRAYS}
                features, which = found["features"], found["which"]
                problems = {int(i): text for i, text in json.loads(str(found["problems"])).items()}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        images = {names[place]: row for place, row in zip(which, features, strict=True)}
        return Measures(**arrays, images=images, problems=problems)

    def save(self, part: int, names: Sequence[Any], measures: Measures) -> None:
        """Save the measures of a part; arguments as in `load`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        which = [place for place, name in enumerate(names) if name in measures.images]
        features = np.array([measures.images[names[place]] for place in which], dtype=np.float32)
        arrays = {name: getattr(measures, name) for name in _ARRAYS}
        temporary = self._file(part).with_suffix(".part")
        with temporary.open("wb") as stream:
            np.savez(
                stream,
                **arrays,
                features=features,
                which=np.array(which, dtype=np.int64),
                problems=np.array(json.dumps(measures.problems)),
            )
        os.replace(temporary, self._file(part))

    def remove(self) -> None:
        """Remove the files, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.npz"

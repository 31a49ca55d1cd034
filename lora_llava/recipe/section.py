"""The base of a recipe's sections, and the types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from lora_llava.recipe.places import Place

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
InputPath = Annotated[str, Place("input")]
"""A file or folder that is read."""
InputName = Annotated[str, Place("named")]
"""A file or folder that is read, a Hub id, or `demo`."""
OutputPath = Annotated[str, Place("output")]
"""A file or folder that is written."""


class Section(BaseModel):
    """A section of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)

"""Row formats: LLaVA's JSON, ShareGPT, messages, tables and captions, all read into conversations.

Each format is a module with a `FORMAT`; `registry` finds them.
"""

from lora_llava.data.formats.captions import BRIEF_REQUESTS
from lora_llava.data.formats.images import IMAGE_COLUMNS, IMAGE_SUFFIXES, likely_image_column
from lora_llava.data.formats.reader import (
    IMAGE_NOT_READ,
    LEADING_ANSWER_CUT,
    OPEN_QUESTION_CUT,
    PLACEHOLDER_ADDED,
    extra_columns,
    read_row,
)
from lora_llava.data.formats.registry import CHAT_COLUMNS, CHOICES, FORMATS, Format, describe_choices, missing_columns
from lora_llava.data.formats.shared import Columns, Detected, RowError, Sample, listed

__all__ = [
    "BRIEF_REQUESTS",
    "CHAT_COLUMNS",
    "CHOICES",
    "FORMATS",
    "IMAGE_COLUMNS",
    "IMAGE_NOT_READ",
    "IMAGE_SUFFIXES",
    "LEADING_ANSWER_CUT",
    "OPEN_QUESTION_CUT",
    "PLACEHOLDER_ADDED",
    "Columns",
    "Detected",
    "Format",
    "RowError",
    "Sample",
    "describe_choices",
    "extra_columns",
    "likely_image_column",
    "listed",
    "missing_columns",
    "read_row",
]

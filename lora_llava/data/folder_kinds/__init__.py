"""Kinds of folder that `init` converts to rows: one module each, listed in `KINDS`."""

from lora_llava.data.folder_kinds.class_folders import ClassFolders
from lora_llava.data.folder_kinds.coco_folder import CocoFolder
from lora_llava.data.folder_kinds.cvat_images import CvatImages
from lora_llava.data.folder_kinds.folder_kind import FolderKind
from lora_llava.data.folder_kinds.hugging_face_folder import HuggingFaceImageFolder
from lora_llava.data.folder_kinds.label_studio import LabelStudio
from lora_llava.data.folder_kinds.vqa_pairs import VqaPairs
from lora_llava.data.folder_kinds.webdataset_shards import WebDatasetShards
from lora_llava.data.folder_kinds.workbooks import Workbooks
from lora_llava.data.folder_kinds.yolo_folder import YoloFolder

KINDS: tuple[FolderKind, ...] = (
    CocoFolder(),
    VqaPairs(),
    LabelStudio(),
    CvatImages(),
    HuggingFaceImageFolder(),
    WebDatasetShards(),
    Workbooks(),
    YoloFolder(),
)
"""Kinds that have files of rows or labels."""
CLASS_FOLDERS = ClassFolders()
"""The kind of a folder that has no such files, and no table."""

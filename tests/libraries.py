"""What `tests.forked` loads before it forks; the objects are then left out of every process's garbage collections."""

import gc

import bitsandbytes  # noqa: F401
import trl  # noqa: F401
from peft import PeftModel  # noqa: F401
from transformers import Trainer  # noqa: F401
from trl import SFTTrainer  # noqa: F401

import lora_llava.commands.evaluate
import lora_llava.evaluation.judge.judge_report
import lora_llava.prepare.row_check
import lora_llava.synthesis.generation
import lora_llava.training.finetune  # noqa: F401

gc.collect()
gc.freeze()

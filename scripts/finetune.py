"""Run `lora-llava finetune`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("finetune"))

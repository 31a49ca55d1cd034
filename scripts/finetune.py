"""`lora-llava finetune`."""

import sys

from lora_llava.cli import main

sys.exit(main("finetune"))

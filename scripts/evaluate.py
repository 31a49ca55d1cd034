"""Run `lora-llava evaluate`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("evaluate"))

"""Run `lora-llava push`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("push"))

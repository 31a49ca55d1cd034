"""Run `lora-llava merge`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("merge"))

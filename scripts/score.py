"""`lora-llava score`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("score"))

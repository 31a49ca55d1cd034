"""`lora-llava score`."""

import sys

from lora_llava.cli import main

sys.exit(main("score"))

"""`lora-llava init`."""

import sys

from lora_llava.cli import main

sys.exit(main("init"))

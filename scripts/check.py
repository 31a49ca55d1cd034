"""`lora-llava check`."""

import sys

from lora_llava.cli import main

sys.exit(main("check"))

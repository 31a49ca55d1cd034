"""`lora-llava push`."""

import sys

from lora_llava.cli import main

sys.exit(main("push"))

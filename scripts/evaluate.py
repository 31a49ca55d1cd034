"""`lora-llava evaluate`."""

import sys

from lora_llava.cli import main

sys.exit(main("evaluate"))

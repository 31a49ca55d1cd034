"""`lora-llava recipes`."""

import sys

from lora_llava.cli import main

sys.exit(main("recipes"))

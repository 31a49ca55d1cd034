"""`lora-llava generate-data`."""

import sys

from lora_llava.cli import main

sys.exit(main("generate-data"))

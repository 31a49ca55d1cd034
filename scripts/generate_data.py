"""`lora-llava generate-data`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("generate-data"))

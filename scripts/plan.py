"""`lora-llava plan`."""

import sys

from lora_llava.cli import main

sys.exit(main("plan"))

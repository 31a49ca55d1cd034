"""`lora-llava report`."""

import sys

from lora_llava.cli import main

sys.exit(main("report"))

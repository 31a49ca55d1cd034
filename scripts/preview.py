"""`lora-llava preview`."""

import sys

from lora_llava.cli import main

sys.exit(main("preview"))

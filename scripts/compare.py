"""`lora-llava compare`."""

import sys

from lora_llava.cli import main

sys.exit(main("compare"))

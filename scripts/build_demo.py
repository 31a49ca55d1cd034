"""`lora-llava build-demo`."""

import sys

from lora_llava.cli import main

sys.exit(main("build-demo"))

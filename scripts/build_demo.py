"""`lora-llava build-demo`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("build-demo"))

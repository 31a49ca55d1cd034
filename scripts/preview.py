"""`lora-llava preview`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("preview"))

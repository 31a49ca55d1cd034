"""`lora-llava filter-captions`."""

import sys

from lora_llava.commands.main import main

sys.exit(main("filter-captions"))

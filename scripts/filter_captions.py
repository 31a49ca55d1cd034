"""`lora-llava filter-captions`."""

import sys

from lora_llava.cli import main

sys.exit(main("filter-captions"))

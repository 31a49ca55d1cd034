"""`lora-llava merge`."""

import sys

from lora_llava.cli import main

sys.exit(main("merge"))

"""`lora-llava chat`."""

import sys

from lora_llava.cli import main

sys.exit(main("chat"))

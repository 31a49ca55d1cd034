"""`lora-llava import`."""

import sys

from lora_llava.cli import main

sys.exit(main("import"))

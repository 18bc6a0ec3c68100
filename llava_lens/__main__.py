"""`python -m llava_lens` is the `llava-lens` command."""

import sys

from llava_lens.cli import main

sys.exit(main())

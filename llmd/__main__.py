"""`python -m llmd` is the `llmd` command."""

import sys

from llmd.cli import main

sys.exit(main())

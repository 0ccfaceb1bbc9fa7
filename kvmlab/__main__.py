"""`python -m kvmlab` is the command `kvmlab`."""

import sys

from .cli import main

sys.exit(main())

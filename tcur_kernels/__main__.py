"""``python -m tcur_kernels``: see `cli`."""

import sys

from .cli import main

sys.exit(main())

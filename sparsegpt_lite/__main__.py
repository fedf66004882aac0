"""`python -m sparsegpt_lite`."""

import sys

from sparsegpt_lite.cli import main

sys.exit(main())

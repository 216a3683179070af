"""``python -m svf_lightning``."""

import sys

from svf_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())

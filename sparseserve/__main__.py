"""``python -m sparseserve``."""

import os
import sys

# ``python -m`` puts the current folder first, which may be that of a downloaded model.
here = os.getcwd()
if sys.path[0] == here != os.path.dirname(os.path.dirname(__file__)):
    del sys.path[0]

from sparseserve.cli import main  # noqa: E402  # with the path in order

if __name__ == "__main__":
    main()

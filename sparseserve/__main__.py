"""``python -m sparseserve``."""

from sparseserve.cli import main

if __name__ == "__main__":
    main()

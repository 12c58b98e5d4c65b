"""`python -m geoquant` is the same as `geoquant`."""

from __future__ import annotations

from geoquant.cli import main

if __name__ == "__main__":
    main()

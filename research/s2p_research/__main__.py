"""``python -m s2p_research``."""

import sys

from s2p_research.app import main

if __name__ == "__main__":
    sys.exit(main())

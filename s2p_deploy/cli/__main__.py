"""``python -m s2p_deploy.cli``, which is how launchers of several processes start the command line."""

import sys

from s2p_deploy.cli import main

sys.exit(main())

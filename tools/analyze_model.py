#!/usr/bin/env python3
"""Print how large the network of a config is, and what an image costs it: see --help."""

import sys

from ia_gcn.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Look at a data set before training on it: see --help."""

import sys

from ia_gcn.commands.inspect import main

if __name__ == "__main__":
    sys.exit(main())

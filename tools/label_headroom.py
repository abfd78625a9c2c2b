#!/usr/bin/env python3
"""How much labels say of each other, for given predictions: see --help."""

import sys

from ia_gcn.commands.label_headroom import main

if __name__ == "__main__":
    sys.exit(main())

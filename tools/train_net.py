#!/usr/bin/env python3
"""Train and evaluate a multi-label recogniser: see --help."""

import sys

from ia_gcn.commands.train import main

if __name__ == "__main__":
    sys.exit(main())

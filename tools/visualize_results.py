#!/usr/bin/env python3
"""Draw what a run of tools/train_net.py left in its output folder: see --help."""

import sys

from ia_gcn.commands.visualize_results import main

if __name__ == "__main__":
    sys.exit(main())

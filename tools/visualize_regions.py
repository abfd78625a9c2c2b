#!/usr/bin/env python3
"""Draw what a trained IA-GCN sees in images: see --help."""

import sys

from ia_gcn.commands.visualize_regions import main

if __name__ == "__main__":
    sys.exit(main())

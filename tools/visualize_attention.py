#!/usr/bin/env python3
"""Draw what a trained model looked at for each label: see --help."""

import sys

from ia_gcn.commands.visualize_attention import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""A page to try a trained model: see --help."""

import sys

from ia_gcn.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())

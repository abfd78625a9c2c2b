#!/usr/bin/env python3
"""Make a checkpoint of this project of another project's weights: see --help."""

import sys

from ia_gcn.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Write a data set as tar shards: see --help."""

import sys

from ia_gcn.commands.make_shards import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Find labels of a data set that are probably wrong: see --help."""

import sys

from ia_gcn.commands.find_label_errors import main

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Say which labels are in images: `ia_gcn.commands.predict` has the options."""

import sys

from ia_gcn.commands.predict import main

if __name__ == "__main__":
    sys.exit(main())

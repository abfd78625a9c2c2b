#!/usr/bin/env python3
"""Write a trained model as one file that runs by itself: `ia_gcn.commands.export` says how."""

import sys

from ia_gcn.commands.export import main

if __name__ == "__main__":
    sys.exit(main())

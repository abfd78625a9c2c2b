#!/usr/bin/env python3
"""Say which labels are in many images: `ia_gcn.commands.predict_distributed` has the options."""

import sys

from ia_gcn.commands.predict_distributed import main

if __name__ == "__main__":
    sys.exit(main())

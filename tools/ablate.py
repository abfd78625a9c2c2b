#!/usr/bin/env python3
"""Compare configs over several seeds, see ia_gcn/commands/ablate.py."""

import sys

from ia_gcn.commands.ablate import main

if __name__ == "__main__":
    sys.exit(main())

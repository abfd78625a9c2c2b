#!/usr/bin/env python3
"""Measure the predictions of an evaluation again: see --help."""

import sys

from ia_gcn.commands.evaluate_predictions import main

if __name__ == "__main__":
    sys.exit(main())

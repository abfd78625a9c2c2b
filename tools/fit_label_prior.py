#!/usr/bin/env python3
"""Fit a label prior to a trained model or to predictions: see --help."""

import sys

from ia_gcn.commands.fit_label_prior import main

if __name__ == "__main__":
    sys.exit(main())

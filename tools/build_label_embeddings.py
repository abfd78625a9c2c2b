#!/usr/bin/env python3
"""Compute label embeddings from images with a trained network: see --help."""

import sys

from ia_gcn.commands.build_label_embeddings import main

if __name__ == "__main__":
    sys.exit(main())

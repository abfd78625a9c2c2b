"""What tools/benchmark.py compares: a module for each of its subjects."""

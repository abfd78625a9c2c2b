"""What tools/torture.py does to the program; a module for each subject."""

"""The command lines: each module has a `main(argv=None)`, which tools/ and `ia-gcn` call.

A command parses its arguments, calls into the package once, and prints the result.
"""

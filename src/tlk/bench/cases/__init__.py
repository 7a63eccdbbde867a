"""The cases of each kernel, one module per kernel file, each with a tuple `CASES`."""

"""The version, which files written by tlk carry."""

__version__ = "0.1.0"

"""What the original packers wrote: see README.md."""

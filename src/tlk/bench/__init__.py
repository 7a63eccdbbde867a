"""What is measured, and how: cases with their bytes and FLOPs, shared by benchmarks and the compile gate."""

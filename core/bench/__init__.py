"""Benchmarks of one engine: workloads, metrics, sessions, reports. `interlace bench` is the door to them."""

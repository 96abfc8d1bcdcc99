"""Benchmarks: what the hand-written code costs beside the libraries, measured side by side. See README.md here."""

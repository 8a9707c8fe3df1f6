"""How fast the norms are beside their peers, and how right: ``python -m benchmarks --help``."""

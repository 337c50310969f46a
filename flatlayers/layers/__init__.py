"""The layers, a family per file."""

"""The layer: what it declares, how it is called, and what is made of it."""

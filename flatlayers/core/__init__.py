"""The four ideas: `Layout`, `ComponentVector`, `Layer` and `Record`."""

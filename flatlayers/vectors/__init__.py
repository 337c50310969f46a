"""Named vectors: one array, and names for its parts."""

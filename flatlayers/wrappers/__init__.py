"""What changes or wraps a layer."""

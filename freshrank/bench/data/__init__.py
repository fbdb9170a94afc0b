"""Features and validation at size."""

"""Who runs the steps, and where."""

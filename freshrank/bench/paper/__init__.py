"""Every row of the paper's table 1 and its figures, on any data."""

"""What a scheduler reads: one file per schedule. They only name steps; the work is in ``freshrank.pipeline``."""

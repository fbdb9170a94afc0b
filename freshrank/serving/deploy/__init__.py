"""What moves the pointer: publications, roll-backs, experiments, local servers."""

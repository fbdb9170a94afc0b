"""What moves the pointer: publications, rollbacks, experiments, local servers."""

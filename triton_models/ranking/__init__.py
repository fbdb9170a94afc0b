"""What clients call: ids in, probabilities out."""

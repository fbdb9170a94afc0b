"""From frames to a trained ranker."""

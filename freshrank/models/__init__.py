"""The ranker and its parts."""

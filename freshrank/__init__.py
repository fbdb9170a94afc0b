"""freshrank: daily retraining, proof and serving of a ranker that does not under-serve new items."""

__version__ = "0.1.0"

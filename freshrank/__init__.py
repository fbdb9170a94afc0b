"""freshrank: daily retraining, evaluation and serving of a ranker that does not under-serve fresh items."""

__version__ = "0.1.0"

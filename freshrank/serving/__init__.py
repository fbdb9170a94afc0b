"""The model repository, and all that asks, answers or changes what serves."""

"""From log to arrays, the same for training and serving."""

"""Examples per second and memory of training."""

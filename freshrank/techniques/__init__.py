"""The techniques as pieces of torch, for any training loop."""

"""The models that Triton runs: code, and templates of their configuration. They become versions in a repository."""

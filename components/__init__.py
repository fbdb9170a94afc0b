"""The Kubeflow pipeline: what runs in which order, and the gate between judging and serving."""

"""The Kubeflow pipeline, run locally or submitted to a cluster."""

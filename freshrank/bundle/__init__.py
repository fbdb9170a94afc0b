"""What is exported and served: its files, golden answers, and the ONNX ranker. Training writes it, serving reads it."""

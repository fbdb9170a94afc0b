"""What runs inside Triton for each request."""

"""Latency, throughput and swaps under load."""

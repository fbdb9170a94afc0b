"""Scores feature blocks; a version of it per published bundle."""

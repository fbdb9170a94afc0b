"""The feature definitions of a dataset, for Feast's own command line."""

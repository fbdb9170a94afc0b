"""Side-by-side measurements, one command each. Nothing outside this package and the command line imports it."""

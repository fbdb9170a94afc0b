"""Side-by-side measurements on several seeds; each writes its evidence."""

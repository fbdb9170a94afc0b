"""What a web server imports to ask for a ranking."""

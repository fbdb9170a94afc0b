"""Arguments in, sentences out; no logic."""

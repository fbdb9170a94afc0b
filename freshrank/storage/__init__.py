"""Files, object stores and the workspace; nothing about machine learning."""

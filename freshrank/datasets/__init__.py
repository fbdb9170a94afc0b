"""The data contract on disk: importing, appending, reading."""

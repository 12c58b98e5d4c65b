"""Text and records: files in, token windows out."""

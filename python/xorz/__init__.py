"""Exact fine-tunes of one base model."""

"""Sentence pairs, subwords, and folders in fairseq's format."""

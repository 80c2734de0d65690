"""Sentence pairs and documents, subwords, and folders in fairseq's and nanoGPT's formats."""

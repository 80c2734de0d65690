"""A decoder language model on plain text; beyond the paper."""

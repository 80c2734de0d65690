"""The Transformer on German-English sentence pairs."""

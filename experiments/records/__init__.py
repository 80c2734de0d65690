"""What a run leaves on disk, and where its numbers come from."""

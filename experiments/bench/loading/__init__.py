"""What reading and loading data costs."""

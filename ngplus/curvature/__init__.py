"""From sums over samples to L or R, (4)(5): scaled, averaged over processes and time (11), damped, inverted."""

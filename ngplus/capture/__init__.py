"""From a forward and backward pass to sums over samples: which calls use a weight, and what came back through them."""

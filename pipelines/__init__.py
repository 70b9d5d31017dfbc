"""What happens to data and weights: prepare, train, merge, evaluate, predict; a module a stage."""

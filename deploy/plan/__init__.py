"""Predicts the speed of a run: the real replay and train loop in simulated time, on measured service times."""

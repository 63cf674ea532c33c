"""Attention as a function: checks its inputs, asks the planner, runs one kernel."""

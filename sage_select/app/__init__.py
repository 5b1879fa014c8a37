"""Configurations of runs, and the jobs that Python and the terminal start from them."""

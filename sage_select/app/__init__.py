"""One file describes a run; Python and the terminal drive it."""

"""What `reproduce.py` runs, what that costs, and who runs it: this machine, or a Ray cluster."""

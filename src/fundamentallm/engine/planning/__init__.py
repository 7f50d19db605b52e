"""Plan a run: small runs are measured, a law is fitted to them, and the run is chosen by it."""

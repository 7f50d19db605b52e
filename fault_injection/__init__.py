"""Long trials of what a run must survive, one command each, and the fault tools that they share."""

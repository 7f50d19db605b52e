"""How the parts of a run are chosen and connected."""

"""One HTML page about a checkpoint, in one file that needs no network."""

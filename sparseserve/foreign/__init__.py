"""Reading 2:4 checkpoints of other tools, among them formats that no current tool opens."""

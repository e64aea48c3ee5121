"""The whole job in order: what is asked for, its rehearsal, the run."""

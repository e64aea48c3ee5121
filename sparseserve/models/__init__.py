"""Models: loading them, finding their decoder layers and operators, running them layer by layer."""

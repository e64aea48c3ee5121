"""Pure tensor functions that minimise the layer-wise objective; they know no module or file."""

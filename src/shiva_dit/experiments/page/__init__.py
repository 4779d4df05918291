"""One self-contained HTML page of a comparison, a frontier, a training or generated pictures."""

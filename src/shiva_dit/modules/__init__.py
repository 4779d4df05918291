"""What is learned, on torch alone."""

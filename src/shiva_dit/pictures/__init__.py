"""Pictures by any pipeline, and what they are worth."""

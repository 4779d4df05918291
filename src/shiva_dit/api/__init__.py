"""What `import shiva_dit` offers beside adapters and schedules."""

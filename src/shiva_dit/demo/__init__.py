"""Small real tasks that train in minutes on a CPU, with their shipped weights."""

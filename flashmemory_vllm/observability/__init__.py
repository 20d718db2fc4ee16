"""What the backend counts, how it crosses processes, and how it reaches Prometheus."""

"""What happened: metrics, logs and the record of each request."""

"""Several processes before one gateway: fronts speak with clients, the gateway decides and speaks with engines."""

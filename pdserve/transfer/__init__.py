"""Moving KV blocks between workers: registered memory, backends, and the service that pulls and verifies."""

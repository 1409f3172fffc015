"""Who is alive: launching, watching and restarting the processes of a deployment, and telling gateways."""

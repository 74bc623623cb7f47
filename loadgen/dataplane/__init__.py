"""What a proxy's data plane costs: mock workers, a load client, and the proxy's CPU time in between."""

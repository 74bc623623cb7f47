"""The real proxy in a simulated world: virtual time, connections in memory, seeded clients and workers."""

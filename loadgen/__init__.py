"""loadgen: the load generator, emulated DP deployment and comparison bench that come with brproxy."""

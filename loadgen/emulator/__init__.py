"""An emulated DP deployment: the cluster model behind HTTP ports that speak vLLM's wire format."""

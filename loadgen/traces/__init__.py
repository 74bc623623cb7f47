"""Where workloads come from: trace files in the common public formats, and synthetic laws."""

"""The HTTP side: handlers, upstream connections, the relay, and the timer that drives the dispatcher."""

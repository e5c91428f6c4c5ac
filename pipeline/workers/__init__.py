"""Where independent parts of a computation are done: here, in other processes, on a cluster."""

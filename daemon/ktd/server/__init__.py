"""The daemon's doors: gRPC, HTTP, metrics, and the life of the process."""
